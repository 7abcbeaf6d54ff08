"""Chat templates: a conversation written as the text that a model was, or is to be, trained on.

The template is a Jinja program that comes with a tokenizer and so from anywhere. It sees messages (tables with `role`
and `content`) and gives text; the dialect is that of transformers' `apply_chat_template`: blocks are trimmed, `break`
and `continue` work, and there are `raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone, and
`{% generation %}...{% endgeneration %}` around what the assistant says.

It runs in Jinja's immutable sandbox: no attribute with an underscore, no changes to what it was given, no `range` of
more than 100,000. Two things are ours. What it is given is rebuilt from plain JSON values, so that no method of a
caller's object is within reach; and the rounds of its loops and macros are counted and end after STEPS, powers and
products at SIZE, so that it does not run for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from sky_core.errors import DataError, UserError

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.runtime import Macro

    from sky_core.tokenizer.base import Tokenizer

Messages = Sequence[Mapping[str, Any]]

STEPS = 100_000
"""Rounds of loops and calls of macros in one rendering."""
SIZE = 1_000_000
"""The longest text or list that a product makes, and the most bits of a number."""

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


class _Generation(Extension):
    """`{% generation %}`: tells the sandbox where in the text its content stands."""

    tags = {"generation"}
    environment: _Sandbox

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.environment.marks = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Macro) -> str:
        text: str = caller()
        state = self.environment.state
        state.places.append((state.length, state.length + len(text)))
        return text


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. `marks`: it has a generation block; `state`: of the rendering in this thread."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.marks = False
        self.state = local()
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeated: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock),
        ]  # fmt: skip
        for node in repeated:
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.body.insert(0, nodes.Output([step]).set_lineno(node.lineno))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.Or(step, node.test).set_lineno(node.lineno)
        return tree

    def step(self) -> str:
        self.state.left -= 1
        if self.state.left < 0:
            raise SecurityError(f"its loops and macros take more than {STEPS:,} steps")
        return ""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            count, text = (left, right) if isinstance(left, int) else (right, left)
            size = count * len(text) if hasattr(text, "__len__") else 0
        else:
            size = 0
        if size > SIZE:
            raise SecurityError(f"{operator} makes something larger than {SIZE:,}")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is out of its reach")


@lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[_Sandbox, jinja2.Template]:
    sandbox = _Sandbox()
    try:
        return sandbox, sandbox.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise UserError(f"the chat template cannot be compiled: {_line(error)}") from None


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
        raise UserError(f"the chat template tries what is forbidden to it: {_line(error)}") from None
    except _Refused as error:
        raise UserError(f"the chat template refuses these messages: {_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - a template is a program, and can fail in any way
        raise UserError(f"the chat template fails: {type(error).__name__}: {_line(error)}") from None
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


class _Refused(jinja2.TemplateError):
    """Raised by a template itself."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
