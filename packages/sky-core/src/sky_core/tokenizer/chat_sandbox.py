"""Where a chat template runs: Jinja's immutable sandbox, with an end to its time and to what one line of it can make.

No attribute with an underscore, no changes to what it was given, no `range` of more than 100,000: that is Jinja's.
Ours: the rounds of its loops and macros are counted and end after STEPS; powers, products, sums, joints and widths end
at SIZE. So it neither runs for ever nor fills the memory in a line (what it builds of many such pieces has no bound).
One that names Python's own attributes or other files is not even compiled: that is told when it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from threading import local
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.runtime import Macro

STEPS = 100_000
"""Rounds of loops and calls of macros in one rendering."""
SIZE = 1_000_000
"""The longest text or list that an operator makes, the most bits of a number, and the largest width or count."""


class _Generation(Extension):
    """`{% generation %}`: tells the sandbox where in the text its content stands."""

    tags = {"generation"}
    environment: Sandbox

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


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. `marks`: it has a generation block; `state`: of the rendering in this thread."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.marks = False
        self.state = local()
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        del self.globals["lipsum"]
        for name in ("center", "indent", "format"):  # to the sandbox a filter is no call
            self.filters[name] = _bounded(self.filters[name], formats=name == "format")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _check_reach(tree)
        repeated: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock),
        ]  # fmt: skip
        for concat in tree.find_all(nodes.Concat):  # a ~ b is no operator to the sandbox: it joins a list instead
            concat.nodes = [nodes.Call(nodes.EnvironmentAttribute("joined"), concat.nodes, [], None, None)]
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

    def joined(self, *parts: Any) -> str:
        """`a ~ b ~ ...`"""
        texts = [str(part) for part in parts]
        _check_size("~", sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, obj: Any, *arguments: Any, **named: Any) -> Any:
        text = getattr(obj, "__self__", None)
        if isinstance(text, str):
            _check_width([*arguments, *named.values()])
        return super().call(context, obj, *arguments, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's own guard of `str.format`, which it asks about every attribute."""
        guarded = super().wrap_str_format(value)
        if guarded is not None:
            _check_width([], form=value.__self__)
        return guarded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            count, text = (left, right) if isinstance(left, int) else (right, left)
            size = count * len(text) if hasattr(text, "__len__") else 0
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            size = len(left) + len(right)
        else:
            size = 0
        _check_size(operator, size)
        if operator == "%" and isinstance(left, str):
            _check_width([], form=left)
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is out of its reach")


def _check_reach(tree: nodes.Template) -> None:
    """Refuse a template that names attributes such as `__class__`, or other files. What it puts together while it runs
    is refused then."""
    if files := next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None):
        raise SecurityError(f"line {files.lineno} reads another file")
    named: list[tuple[Any, int]] = [(node.attr, node.lineno) for node in tree.find_all(nodes.Getattr)]
    arguments = [node.arg for node in tree.find_all(nodes.Getitem)]
    arguments += [one for node in tree.find_all(nodes.Filter) if node.name == "attr" for one in node.args[:1]]
    named += [(one.value, one.lineno) for one in arguments if isinstance(one, nodes.Const)]
    for name, line in named:
        if isinstance(name, str) and re.fullmatch(r"__\w+__", name):
            raise SecurityError(f"the attribute {name!r} in line {line} is out of its reach")


def _check_size(operator: str, size: int) -> None:
    if size > SIZE:
        raise SecurityError(f"{operator} makes something larger than {SIZE:,}")


def _check_width(numbers: Iterable[Any], *, form: str = "") -> None:
    """Refuse widths and counts above SIZE, among `numbers` or in the format `form`, and such as are arguments (`*`)."""
    large = any(isinstance(number, int) and abs(number) > SIZE for number in numbers)
    if large or re.search(r"%[^%a-zA-Z]*\*|\d{7}", form):
        raise SecurityError(f"a width or count is larger than {SIZE:,}")


def _bounded(filter: Callable[..., Any], *, formats: bool) -> Callable[..., Any]:
    """A filter of Jinja's under `_check_width`; its first argument is a text, which may be a format."""

    @wraps(filter)
    def bounded(text: Any, *arguments: Any, **named: Any) -> Any:
        _check_width([] if formats else [*arguments, *named.values()], form=str(text) if formats else "")
        return filter(text, *arguments, **named)

    return bounded


class Refused(jinja2.TemplateError):
    """Raised by a template itself."""


def _refuse(message: str) -> None:
    raise Refused(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
