"""Training progress: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.syntax import Syntax
from rich.text import Text

from oneblock.train.options import Loop
from oneblock.units import format_bytes, format_clock

LINE_WIDTH, BAR_WIDTH = 119, 24  # characters of a line, and of the progress bar before it in a terminal


@dataclass(frozen=True)
class Progress:
    """The state of a run at one step."""

    step: int
    done: float  # fraction of the run, 0 to 1
    loss: float
    speed: float  # tokens per second
    left: float  # seconds until the end
    mfu: float  # fraction of the machine's measured peak
    memory: float  # peak bytes so far

    def line(self, loop: Loop, width: int = LINE_WIDTH) -> str:
        """One line of at most `width` characters; memory, then MFU, are dropped where it is too long."""
        of = f"/{loop.steps:,}" if loop.seconds is None else ""
        where = f"step {self.step:>{len(of) - 1 if of else 6},}{of}  {self.done:4.0%}"
        head = f"{where}  loss {self.loss:.3f}  {self.speed:>7,.0f} tok/s"
        optional = [f"  {self.mfu:3.0%} MFU", f"  {format_bytes(self.memory)}"]
        tail = f"  {format_clock(self.left)} left"
        while optional and len(head + "".join(optional) + tail) > width:
            optional.pop()
        return head + "".join(optional) + tail


class ProgressDisplay:
    """Prints progress lines, and notes between them. Use it in a `with` block."""

    def __init__(self, loop: Loop, console: Console | None = None, every: float = 5.0):
        self.loop, self.console, self.every = loop, console or Console(highlight=False, soft_wrap=True), every
        self.bar = RichProgress(BarColumn(bar_width=BAR_WIDTH), TextColumn("{task.description}"), console=self.console)
        self.task = self.bar.add_task("", total=1.0)
        self.live = Live(self.bar, console=self.console, transient=True) if self.console.is_terminal else None
        self.shown = float("-inf")

    def __enter__(self) -> ProgressDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def update(self, progress: Progress, seconds: float) -> None:
        """Show progress: at once in a terminal, else at most every few seconds and at the end."""
        if self.live:
            line = progress.line(self.loop, min(LINE_WIDTH, self.console.width - 1) - BAR_WIDTH - 1)
            self.bar.update(self.task, completed=progress.done, description=line)
        elif seconds - self.shown >= self.every or progress.done >= 1:
            self.shown = seconds
            self.note(progress.line(self.loop))

    def code(self, text: str) -> None:
        """Print Python source, indented, with syntax colours in a terminal."""
        if self.live:
            self.console.print(Padding(Syntax(text, "python", background_color="default", word_wrap=True), (0, 4)))
        else:
            self.note(indent(text.strip("\n"), "    ") + "\n")

    def note(self, text: str, style: str = "") -> None:
        """Print a line of text."""
        self.console.print(Text(text, style))
