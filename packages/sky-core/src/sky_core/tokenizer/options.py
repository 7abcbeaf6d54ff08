"""What the tokenizer components share: options for special tokens, pre-tokens and chat templates. Torch-free."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from sky_core.errors import UserError
from sky_core.slots import Tokenizer

if TYPE_CHECKING:
    from sky_core.tokenizer.base import Tokenizer as BuiltTokenizer

log = logging.getLogger(__name__)


def _compiles(pattern: str) -> str:
    from sky_core.tokenizer.pattern import compile_pattern

    try:
        compile_pattern(pattern)
    except UserError as error:
        raise ValueError(str(error)) from error
    return pattern


EndOfText = Annotated[bool, Field(description="add the special token <|endoftext|>, which stands between documents")]
Special = Annotated[list[str], Field(description="further special tokens such as <|user|>, with ids behind all others")]
Pattern = Annotated[
    str,
    Field(description="how text is cut first: gpt2, gpt4, nanochat, llama3, qwen2, o200k, or a regular expression"),
    AfterValidator(_compiles),
]


class WithChatTemplate(Tokenizer):
    """A tokenizer component with a chat template, which goes into its files and not into its fingerprint."""

    chat_template: Annotated[
        str | None, Field(description="how a conversation is written as text: chatml, or a Jinja file; null: none")
    ] = None

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without `special` and `chat_template` where nothing is asked for: data prepared before they existed is
        recognised by what it was asked for then."""
        fields = type(self).model_fields
        return {
            key: value
            for key, value in handler(self).items()
            if key not in ("special", "chat_template") or value != fields[key].default
        }

    def with_template(self, make: Callable[[], BuiltTokenizer]) -> BuiltTokenizer:
        """The tokenizer that `make` gives, with the template asked for, which is read before the work begins.

        Warns of names in the template that look like special tokens and are none: they would be spelled out.
        """
        from sky_core.tokenizer.chat import read_template

        template = None if self.chat_template is None else read_template(self.chat_template)
        tokenizer = make()
        if template is not None:
            tokenizer.chat_template = template
            names = dict.fromkeys(re.findall(r"<\|\w+\|>", template))
            if spelled := [name for name in names if name not in tokenizer.special]:
                log.warning(
                    "the chat template writes %s as plain text: no special token of the tokenizer; add special tokens"
                    " (--special; in a run file, special:)",
                    ", ".join(spelled),
                )
        return tokenizer
