"""What the presets amount to: `python tools/presets.py` writes recipes/models/README.md from what `sky show` counts.

Needs sky-core installed; models are built without memory for their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sky_core.cli.quiet import quiet
from sky_core.cli.sizes import measure
from sky_core.config import Preset, read_run_or_preset
from sky_core.errors import ConfigError
from sky_core.training.progress import memory, quantity

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes" / "models"
PAGE = FOLDER / "README.md"
HEAD = """\
# Models

Each file is a model without data or training: the sizes that this project trains itself (`sky-*`), and the published
shapes of other models. A file can be looked at, and a run file can begin with one:

```
sky show recipes/models/sky-50m.yaml
sky show recipes/models/llama-3-8b.yaml optimizer=muon
```
```yaml
extends: models/sky-50m.yaml      # in recipes/mine.yaml
data: {kind: text, path: my_texts/, sequence_length: 1024}
optimizer: {kind: adamw, lr: 3e-3}
train: {steps: 5100, batch_tokens: 196608, micro_batch: 16}
```

The `sky-*` presets name the tokenizer that is trained for them; data that was prepared with another one brings its own
(`tokenizer: null`), and the embedding follows it.

A learning rate and a batch to start from are in their comments, by the formulas of OLMo-core's model ladder for AdamW:
with N parameters a rate of 0.0047 (N / 108M)^(-1/3) / 2, 2048 · 160 (N / 108M)^(2/3) tokens a batch, and N tokens of
warm-up.

## Sizes

FLOPs are those of training on sequences as long as the context. The cache is that of one sequence in bf16 (a window
bounds what is seen of it, not what is held). Memory is what one process holds to train with AdamW in fp32, activations
left out; in bf16 it is 2 bytes more for each parameter of the body. Tokens are 20 for each active parameter, one that a
token passes.
This page is made by `python tools/presets.py`.

| preset | parameters | body | active | context | FLOPs per token | cache, bytes per token | bytes to train | tokens |
|---|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """recipes/models/README.md as it should be."""
    files = sorted(FOLDER.glob("*.yaml"), key=lambda file: (not file.stem.startswith("sky-"), file.stem))
    measured = [(file.stem, sizes_of(file)) for file in files]
    ours = sorted((one for one in measured if one[0].startswith("sky-")), key=lambda one: one[1]["parameters.total"])
    rows = [*ours, *measured[len(ours) :]]
    return HEAD + "".join(f"| {' | '.join([f'[{name}]({name}.yaml)', *cells(sizes)])} |\n" for name, sizes in rows)


def sizes_of(file: Path) -> dict[str, Any]:
    """What `sky show --json` says of the model; the reason under "missing" where a part of it comes with a plugin."""
    try:
        preset = read_run_or_preset(file)
    except ConfigError as error:
        return {"missing": str(error).partition("model.")[2].partition(" (")[0] + " without a plugin"}
    assert isinstance(preset, Preset)
    with quiet():
        return measure(preset)


def cells(sizes: dict[str, Any]) -> Iterator[str]:
    """The columns behind the name."""
    if "missing" in sizes:
        yield sizes["missing"]
        yield from [""] * 7
        return
    for name in ("total", "body", "active"):
        yield quantity(sizes[f"parameters.{name}"])
    yield str(sizes["sequence_length"])
    yield quantity(sizes["flops_per_token"])
    yield memory(sizes["cache_bytes_per_token"]["bf16"])
    yield next(memory(row["bytes"]) for row in sizes["bytes_to_train"] if row["precision"] == "fp32")
    yield quantity(sizes["tokens_for_20_per_parameter"])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
