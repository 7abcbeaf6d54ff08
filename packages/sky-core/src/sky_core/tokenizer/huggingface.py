"""Tokenizers as Hugging Face folders: tokenizer.json with its companions, read and written.

    tokenizer.json           the tokenizer itself (`huggingface_json.py` writes ours, `huggingface_tokenizer.py` reads)
    tokenizer_config.json    which of its tokens begin and end a text; older ones hold the chat template as well
    special_tokens_map.json  the same, from before that
    chat_template.jinja      how a conversation is written as text

A tokenizer that was read is written back as it was, file by file.
"""

from __future__ import annotations

import json
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

from sky_core.errors import DataError
from sky_core.files import write_atomic
from sky_core.tokenizer.base import END_OF_TEXT, Tokenizer
from sky_core.tokenizer.files import CHAT_TEMPLATE, FILE, read_chat_template
from sky_core.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer, make_engine, parse, read_companions

CONFIG = "tokenizer_config.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")
"""Names by which a special token is taken for the end of a text where no file says which one it is."""


def read_huggingface(path: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder, or of a tokenizer.json and the files beside it.

    Raises `DataError` when files are missing, damaged or do not belong together, and `UserError` when the package
    `tokenizers` is missing.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    folder = file.parent
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        raise DataError(f"no {file.name} in {folder}; give a folder that holds one") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is damaged: not UTF-8 (byte {error.start}); get it again") from None
    companions = read_companions(folder)
    config: dict[str, Any] = {}
    for companion, content in reversed(companions.items()):  # what tokenizer_config.json says counts
        config |= _settings(content, folder / companion)
    beside = read_chat_template(folder)
    template = beside or _template(config.get("chat_template"))
    if template:
        from sky_core.tokenizer.chat import check_template

        check_template(template, folder / (CHAT_TEMPLATE if beside else CONFIG))
    try:
        parse(text)
        engine = make_engine(text)
        special = [token.content for token in engine.get_added_tokens_decoder().values() if token.special]
        roles = {role: name for role in ROLES if (name := _name(config.get(role)))}
        prefix = _prefix(engine, config, roles.get("bos_token"))
        end = roles.get("eos_token") or next((name for name in ENDS if name in special), None)
        bos = roles.get("bos_token") or next((engine.id_to_token(i) for i in prefix), None)
        vocab = engine.get_vocab(with_added_tokens=True)
        named = {*filter(None, (end, bos)), *(name for name in _named(config) if name in vocab)}
        tokenizer = HuggingFaceTokenizer(text, sorted(named - {*special}), end, bos, prefix, companions)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    tokenizer.chat_template = template or None
    return tokenizer


def write_huggingface(tokenizer: Tokenizer, folder: str | Path, *, max_length: int | None = None) -> None:
    """Write `tokenizer` so that `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids.

    `max_length` is the model's context in tokens. Raises `UserError` where the format cannot hold the tokenizer
    exactly; nothing is written then.
    """
    folder = Path(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files = {FILE: tokenizer.text, **tokenizer.companions}
        kept = _template(_object(files.get(CONFIG, "{}"), folder / CONFIG).get("chat_template"))
    else:
        files = {FILE: _json(tokenizer.to_huggingface()), CONFIG: _json(_config(tokenizer, max_length))}
        kept = None
    if tokenizer.chat_template not in (None, kept):
        files[CHAT_TEMPLATE] = tokenizer.chat_template
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)


def _config(tokenizer: Tokenizer, max_length: int | None) -> dict[str, Any]:
    names = {i: name for name, i in tokenizer.special.items()}
    ends = {"eos_token": tokenizer.end_of_text, "bos_token": tokenizer.bos}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: names[i] for role, i in ends.items() if i is not None},
        **({} if max_length is None else {"model_max_length": max_length}),
        "clean_up_tokenization_spaces": False,
    }


def _prefix(engine: Any, config: dict[str, Any], bos: str | None) -> list[int]:
    """Ids that are put in front of every text: by the configuration where it says so, else by the file itself."""
    if "add_bos_token" in config or "add_eos_token" in config:
        return [engine.token_to_id(bos)] if config.get("add_bos_token") and bos is not None else []
    found = engine.encode("a", add_special_tokens=True)
    return [i for i, _ in takewhile(itemgetter(1), zip(found.ids, found.special_tokens_mask, strict=True))]


def _named(config: dict[str, Any]) -> set[str]:
    """The tokens that a configuration calls special."""
    more: dict[str, Any] | list[Any] = next(filter(None, map(config.get, LISTS)), [])
    values = [*(config.get(role) for role in ROLES), *(more.values() if isinstance(more, dict) else more)]
    return {name for value in values if (name := _name(value))}


def _settings(text: str, path: Path) -> dict[str, Any]:
    """What a companion file says. Raises `DataError` where a token or a template is of a type that neither can be."""
    content = _object(text, path)
    rules = dict.fromkeys(ROLES, _is_name) | dict.fromkeys(LISTS, _is_list) | {"chat_template": _is_template}
    for key, right in rules.items():
        if (value := content.get(key)) and not right(value):
            raise DataError(f"{path} is damaged ({key} is {json.dumps(value):.60}); get it again")
    return content


def _is_name(value: Any) -> bool:
    return isinstance(_name(value) or "", str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(_is_name, value.values() if isinstance(value, dict) else value))


def _is_template(value: Any) -> bool:
    named = isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return isinstance(value, str) or (named and all(isinstance(one.get("template"), str) for one in value))


def _name(value: Any) -> str | None:
    """A token is given by its name, or by a table with its name under `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _template(value: Any) -> str | None:
    """The chat template of a configuration; of several with names, the default."""
    if isinstance(value, list):
        return next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value


def _object(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); get it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged (no JSON object); get it again")
    return content


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
