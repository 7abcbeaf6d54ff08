"""recipes/models/README.md holds what `sky show` counts of each preset."""

from __future__ import annotations

import presets


def test_the_page_is_what_the_presets_amount_to() -> None:
    assert presets.PAGE.read_text(encoding="utf-8") == presets.page(), "stale: run python tools/presets.py"
