"""What a person sees of a run, on stderr: a live display on a terminal, one plain line per log where there is none.

    step  1 240/12 000  10.3%  loss 4.812  bpb 1.43  lr 9.1e-04  gnorm 0.71  1.74k tok/s  mfu 41%  rss 3.1G  eta 5h42
    eval  1 250  loss 4.790  bpb 1.421 (-0.018)  ★ best
    sample  1 250  'The capital' 'of France is the first of the most'

rich honours NO_COLOR and TERM=dumb; a dumb terminal gets the plain lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


def integer(number: int) -> str:
    """`12 000`."""
    return f"{number:,}".replace(",", " ")


def quantity(number: float) -> str:
    """`1.74k`, `12.1M`, `640`, `2.1e+33`: about three digits."""
    if not abs(number) < 1e15:
        return f"{number:.2g}"
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            scaled = number / factor
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{unit}"
    return f"{number:.3g}"


def memory(size: float) -> str:
    """Bytes as `3.1G`, `850M` or `6.5K` (powers of 1024)."""
    if size >= 2**30:
        return f"{size / 2**30:.1f}G"
    if size >= 2**20:
        return f"{size / 2**20:.0f}M"
    return f"{size / 2**10:.3g}K" if size >= 2**10 else f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """`43s`, `12m05`, `5h42`, `3d04h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}"
    return f"{minutes}m{rest:02}" if minutes else f"{rest}s"


SHOWN: dict[str, Callable[[Any], str]] = {
    "loss": lambda v: f"loss {v:.4f}",
    "bits_per_byte": lambda v: f"bpb {v:.3f}",
    "perplexity": lambda v: f"ppl {quantity(v)}",
    "lr": lambda v: f"lr {v:.1e}",
    "grad_norm": lambda v: f"gnorm {v:.2f}",
    "tokens_per_second": lambda v: f"{quantity(v)} tok/s",
    "wait": lambda v: f"waits for data {v:.0%}" if v >= 0.02 else "",
    "mfu": lambda v: f"mfu {v:.0%}" if v >= 0.1 else f"mfu {v:.1%}",
    "peak_rss": lambda v: f"rss {memory(v)}",
    "peak_gpu": lambda v: f"gpu {memory(v)}",
    "skipped": lambda v: f"skipped {v}" if v else "",
    "eta_seconds": lambda v: f"eta {duration(v)}",
}
"""How a metric is written, in this order; any other is written with its own name, after the loss."""

HIDDEN = frozenset({"tokens", "bytes", "sequences", "items", "chance", "seconds_per_step"})
"""What a line leaves out, standard errors as well; so it does where this is the last part of a name (`cloze/items`)."""

COMPARED = frozenset({"loss", "bits_per_byte"})


def describe(metrics: Mapping[str, float], before: Mapping[str, float] | None = None) -> list[str]:
    """The words for each metric; those in `COMPARED` with their change against `before`."""

    def words(name: str) -> str:
        value = metrics[name]
        text = SHOWN[name](value) if name in SHOWN else f"{name} {value:.4g}"
        return f"{text} ({value - before[name]:+.3f})" if before and name in COMPARED and name in before else text

    def hidden(name: str) -> bool:
        return name.rpartition("/")[2] in HIDDEN or name.endswith("_stderr")

    order = ["loss", *(name for name in metrics if name not in SHOWN and not hidden(name)), *SHOWN]
    return [text for name in dict.fromkeys(order) if name in metrics and (text := words(name))]


class Progress:
    """Shows nothing: what every process but the main one uses. A context manager, as its subclasses are."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self.total_steps = total_steps
        self.console = console or Console(stderr=True)

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; `metrics` are those of the last."""

    def evaluation(self, step: int, results: Mapping[str, float], *, best: bool = False) -> None:
        """An evaluation at `step`; changes against the one before are shown in parentheses."""

    def sample(self, step: int, text: str, prompt: str = "") -> None:
        """Text sampled after `prompt`; line breaks and control characters are shown escaped."""

    def message(self, text: str) -> None:
        """A line for the reader."""


class PlainProgress(Progress):
    """One line for each call, without control codes."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        super().__init__(total_steps, console)
        self._evaluated: Mapping[str, float] | None = None

    def message(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.message("  ".join([self._position(step), f"{step / self.total_steps:.1%}", *describe(metrics)]))

    def evaluation(self, step: int, results: Mapping[str, float], *, best: bool = False) -> None:
        words = ["eval", integer(step), *describe(results, self._evaluated), *(["★ best"] if best else [])]
        self.message("  ".join(words))
        self._evaluated = dict(results)

    def sample(self, step: int, text: str, prompt: str = "") -> None:
        self.message("  ".join(["sample", integer(step), f"{prompt!r} {text!r}" if prompt else repr(text)]))

    def _position(self, step: int) -> str:
        total = integer(self.total_steps)
        return f"step  {integer(step):>{len(total)}}/{total}"


class LiveProgress(PlainProgress):
    """A bar and the last metrics at the bottom of the terminal; evaluations, samples and messages scroll above it."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        super().__init__(total_steps, console)
        self._step = 0
        self._words: list[str] = []
        self._live = Live(
            console=self.console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False
        )

    def start(self) -> None:
        self._live.start(refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step, self._words = step, describe(metrics)

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self._position(self._step), style="bold"),
            ProgressBar(total=self.total_steps, completed=self._step, width=24),
            Text(f"{self._step / self.total_steps:.1%}", style="cyan"),
        )
        return Group(bar, Text("  ".join(self._words), overflow="fold"))


def make_progress(total_steps: int, *, quiet: bool = False, console: Console | None = None) -> Progress:
    """Live on a terminal, plain lines otherwise, nothing when `quiet`."""
    console = console or Console(stderr=True)
    if quiet:
        return Progress(total_steps, console)
    live = console.is_terminal and not console.is_dumb_terminal
    return (LiveProgress if live else PlainProgress)(total_steps, console)
