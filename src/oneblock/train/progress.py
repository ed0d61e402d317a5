"""What a training run shows: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.text import Text

from oneblock.train.options import Loop

WIDTH, BAR = 119, 24  # characters of a line, and of the bar before it in a terminal


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:01:00`."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def lasting(seconds: float) -> str:
    """`45 seconds`, `12 minutes`, `5.1 hours`, `6.3 days`: for what is not known better."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.7 * unit:
            return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{max(1, round(seconds))} seconds" if seconds > 1.5 else "1 second"


def size(n: float) -> str:
    if n >= 1e9:
        return f"{n / 1e9:.1f} GB"
    return f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


@dataclass(frozen=True)
class Reading:
    """One look at a run."""

    step: int
    done: float  # share of the run, 0 to 1
    loss: float
    speed: float  # tokens per second
    left: float  # seconds
    mfu: float  # share of the machine's measured peak
    memory: float  # bytes, the most so far

    def line(self, loop: Loop, room: int = WIDTH) -> str:
        """In at most `room` characters, as far as that goes: share of the peak and memory are left out first."""
        of = f"/{loop.steps:,}" if loop.seconds is None else ""
        where = f"step {self.step:>{len(of) - 1 if of else 6},}{of}  {self.done:4.0%}"
        begin = f"{where}  loss {self.loss:.3f}  {self.speed:>7,.0f} tok/s"
        more, end = [f"  {self.mfu:3.0%} MFU", f"  {self.memory / 1e9:.1f} GB"], f"  {clock(self.left)} left"
        while more and len(begin + "".join(more) + end) > room:
            more.pop()
        return begin + "".join(more) + end


class Show:
    """Prints readings, and notes between them. Use it in a `with` block."""

    def __init__(self, loop: Loop, console: Console | None = None, every: float = 5.0):
        self.loop, self.console, self.every = loop, console or Console(highlight=False, soft_wrap=True), every
        self.bar = Progress(BarColumn(bar_width=BAR), TextColumn("{task.description}"), console=self.console)
        self.task = self.bar.add_task("", total=1.0)
        self.live = Live(self.bar, console=self.console, transient=True) if self.console.is_terminal else None
        self.shown = float("-inf")

    def __enter__(self) -> Show:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def reading(self, reading: Reading, seconds: float) -> None:
        """Show it: at once in a terminal, else at most every few seconds and at the end."""
        if self.live:
            line = reading.line(self.loop, min(WIDTH, self.console.width - 1) - BAR - 1)
            self.bar.update(self.task, completed=reading.done, description=line)
        elif seconds - self.shown >= self.every or reading.done >= 1:
            self.shown = seconds
            self.note(reading.line(self.loop))

    def code(self, text: str) -> None:
        """Python source, coloured in a terminal, set in from the margin."""
        if self.live:
            self.console.print(Padding(Syntax(text, "python", background_color="default", word_wrap=True), (0, 4)))
        else:
            self.note(indent(text.strip("\n"), "    ") + "\n")

    def note(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style))
