"""Generated tokens as text while they arrive: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from sky_core.tokenizer.base import StreamDecoder, Tokenizer


class TextStream:
    """Takes token ids one by one and returns the text that is certain.

    Held back are the bytes of an unfinished character and text that may turn out to begin a stop string. The text ends
    before the stop string that is complete first (of several ending together, the longest), whatever the
    borders of tokens; `stopped` is then true.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """The text that became certain with `token`."""
        return self._release(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, once no token follows; bytes of an unfinished character become U+FFFD."""
        text = self._release(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        self._held = ""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        certain = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
