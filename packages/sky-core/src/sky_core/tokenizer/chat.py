"""Chat templates: a conversation written as the text that a model was, or is to be, trained on.

The template is a Jinja program that comes with a tokenizer and so from anywhere. It sees messages (tables with `role`
and `content`) and gives text; the dialect is that of transformers' `apply_chat_template`: blocks are trimmed, `break`
and `continue` work, and there are `raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone, and
`{% generation %}...{% endgeneration %}` around what the assistant says.

It runs in a sandbox (`chat_sandbox.py`), so that a file from anywhere can do no more than write text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.sandbox import SecurityError

from sky_core.errors import DataError, UserError
from sky_core.tokenizer.chat_sandbox import STEPS, Refused, Sandbox, one_line

if TYPE_CHECKING:
    from sky_core.tokenizer.base import Tokenizer

Messages = Sequence[Mapping[str, Any]]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
}
"""Templates by name. chatml (OpenAI 2023) wants the special tokens <|im_start|> and <|im_end|>."""


def read_template(name: str) -> str:
    """A template of TEMPLATES, or the text of a file. Raises `UserError` when it is neither or no template."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    try:
        template = path.read_bytes().decode()
    except OSError as error:
        have = ", ".join(TEMPLATES)
        raise UserError(
            f"no chat template called {name!r} (have: {have}), and no such file: {error.strerror}"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    _compiled(template)
    return template


def check_template(template: str, where: Path) -> None:
    """Raise `DataError`, which names the file `where`, when this is no template or one that would run code."""
    try:
        _compiled(template)
    except UserError as error:
        raise DataError(f"{where}: {error}; take it out if you can do without it, or get another") from None


def render_chat(
    tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """`messages` as text, by the tokenizer's chat template.

    With `add_generation_prompt` it ends where the assistant's answer begins. `variables` (`tools`, `documents`, ...)
    are seen by the template, JSON values all. Raises `UserError` when there is no template, when it refuses the
    messages, fails, or tries what the sandbox forbids.
    """
    return _render(tokenizer, messages, add_generation_prompt, variables)[0]


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any
) -> list[int]:
    """`render_chat` as ids, with the special tokens that the template writes.

    A name of a special token that stands in a message is that token too, as everywhere; `Tokenizer.encode` is for
    text that may not have this power.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt, **variables)
    return tokenizer.encode_with_special(text)


def encode_chat_with_mask(
    tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any
) -> tuple[list[int], list[bool]]:
    """`encode_chat`, and of each token whether any of it is what the assistant says.

    That is what the template writes inside `{% generation %}`. Raises `UserError` for a template without such a block.
    """
    if not _compiled(_template_of(tokenizer))[0].marks:
        raise UserError(
            "the chat template does not say what the assistant says: write {% generation %} and {% endgeneration %} "
            "around that"
        )
    text, places = _render(tokenizer, messages, add_generation_prompt, variables)
    marked = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in places]
    spans = tokenizer.encode_spans(text)
    mask = [any(start < last and first < end for first, last in marked) for _, start, end in spans]
    return [i for i, _, _ in spans], mask


@lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[Sandbox, jinja2.Template]:
    sandbox = Sandbox()
    try:
        return sandbox, sandbox.from_string(template)
    except SecurityError as error:
        raise UserError(f"the chat template tries what is forbidden to it: {one_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise UserError(f"the chat template cannot be compiled: {one_line(error)}") from None


def _template_of(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            "this tokenizer has no chat template; put a chat_template.jinja beside its tokenizer.json, or train one "
            "with: sky tokenizer train --chat-template chatml"
        )
    return tokenizer.chat_template


def _render(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it (in characters) the generation blocks are."""
    sandbox, template = _compiled(_template_of(tokenizer))
    names = {i: name for name, i in tokenizer.special.items()}
    ends = {"bos_token": tokenizer.bos, "eos_token": tokenizer.end_of_text}
    given = {
        **{role: names[i] for role, i in ends.items() if i is not None},
        "tools": None,
        "documents": None,
        **{name: _plain(value) for name, value in variables.items()},
        "messages": [_plain(dict(message)) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    state = sandbox.state
    state.left, state.length, state.places = STEPS, 0, []
    parts = []
    try:
        for part in template.generate(given):
            parts.append(part)
            state.length += len(part)
    except (SecurityError, OverflowError) as error:
        raise UserError(f"the chat template tries what is forbidden to it: {one_line(error)}") from None
    except Refused as error:
        raise UserError(f"the chat template refuses these messages: {one_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - a template is a program, and can fail in any way
        raise UserError(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from None
    return "".join(parts), state.places


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON's types. Raises `UserError` for any other."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise UserError(f"a chat template is given texts, numbers, lists and tables, not a {type(value).__name__}")
