"""A tokenizer on disk: one `tokenizer.json` that says its kind, what defines it, and the fingerprint of that.

    {"format": "sky-tokenizer", "version": 1, "fingerprint": "0123456789abcdef", "kind": "bpe", ...}

The fingerprint is taken again when the file is read, so an edited or damaged file never turns text into other ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sky_core.component import active_catalog, closest
from sky_core.errors import DataError, PluginError
from sky_core.files import write_atomic, write_json

if TYPE_CHECKING:
    from sky_core import slots
    from sky_core.tokenizer.base import Tokenizer

FILE = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
FORMAT = "sky-tokenizer"
VERSION = 1


def fingerprint_of(definition: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the canonical JSON of what defines a tokenizer."""
    text = json.dumps(definition, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder`/tokenizer.json in one step, and the chat template beside it; the folder is made if need be."""
    definition = tokenizer.as_dict()
    header = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint_of(definition)}
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.chat_template is None:
        (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    else:
        write_atomic(folder / CHAT_TEMPLATE, tokenizer.chat_template)
    write_json(folder / FILE, {**header, **definition})


def read_chat_template(folder: Path) -> str | None:
    """The chat template beside a tokenizer, None where there is none. Raises `DataError` when it is no text."""
    path = folder / CHAT_TEMPLATE
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); restore it or delete it") from None


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """What defines the tokenizer saved in `folder`. Raises `DataError` when the file is missing, strange or damaged."""
    path = folder / FILE
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no tokenizer in {folder}: {FILE} is missing; train one with: sky tokenizer train") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); restore it or train the tokenizer again") from None
    if not isinstance(definition, dict) or definition.pop("format", None) != FORMAT:
        raise DataError(f"{path} is no skyGPT tokenizer (its 'format' is not {FORMAT!r})")
    if (version := definition.pop("version", None)) != VERSION:
        raise DataError(f"{path} has format version {version}, this sky-core reads version {VERSION}; upgrade sky-core")
    recorded = definition.pop("fingerprint", None)
    if (actual := fingerprint_of(definition)) != recorded:
        raise DataError(
            f"{path} was edited or damaged: its content has the fingerprint {actual}, the file says {recorded}; "
            "restore it or train the tokenizer again"
        )
    return definition


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder`, of whatever kind.

    Raises `DataError` when it cannot be read, `PluginError` when no loaded plugin offers its kind.
    """
    folder = Path(folder)
    kind = str(read_tokenizer(folder).get("kind"))
    offered = active_catalog()["tokenizer"]
    if kind not in offered:
        from sky_core.plugins import where_to_find

        hint = where_to_find("tokenizer", kind) or closest(kind, offered)
        raise PluginError(f"{folder / FILE}: no tokenizer called {kind!r} (have: {', '.join(sorted(offered))}){hint}")
    component = cast("type[slots.Tokenizer]", offered[kind])
    return component.load(folder)
