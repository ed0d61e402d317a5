"""`oneblock demo`: a small Llama learns to write Python from the standard library of the Python that runs it."""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oneblock.errors import OneblockError

if TYPE_CHECKING:
    from oneblock.train.loop import Metrics, State
    from oneblock.train.options import Train
    from oneblock.train.trainer import Trainer

SIZE = 6_000_000  # characters of source to learn from
LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "_bundled"}
RESERVE = 8.0  # seconds for the last validation, the picture and the completions
LOOKS = (0.03, 0.15, 0.4, 0.7)  # shares of the run after which a sample is shown
PROMPTS = ("class", "    def __init__(self", "    for", "import")


@dataclass(frozen=True)
class Demo:
    """Train a small Llama on Python's standard library, without a download or a GPU, and let it write."""

    seconds: float = 90.0  # for everything
    out: Path | None = None  # the run's folder; without it: runs/demo, or the next free number
    seed: int = 0


def demo(options: Demo) -> None:
    began = time.perf_counter()
    if options.seconds < 15:
        raise OneblockError(f"--seconds is {options.seconds:g}, but the demonstration takes at least 15")
    run = folder(options.out)
    text = run / f"python-{platform.python_version()}.txt"
    text.write_text(corpus(), encoding="utf-8")
    print(f"Learning to write Python from the standard library of Python {platform.python_version()}.")
    session = begin(run, text, options, began)
    if not session.go(Looks(session).look):
        print(f"stopped and saved; go on with: {command()} train --resume {run}", file=sys.stderr)
        raise SystemExit(130)
    write(session)
    print(f"\nDone in {time.perf_counter() - began:.0f} seconds. {farewell(run)}")


def begin(run: Path, text: Path, options: Demo, began: float) -> Trainer:
    from oneblock.train.commands import summary
    from oneblock.train.prepare import prepare
    from oneblock.train.progress import Show
    from oneblock.train.run import record
    from oneblock.train.trainer import Trainer, fresh

    plan = settings(text, options.seed)
    job = prepare(plan)
    state = fresh(job, plan)
    left = options.seconds - (time.perf_counter() - began) - RESERVE
    plan = timed(plan, max(left, 5.0))
    record(run, plan)
    print(summary(job, plan) + "\n")
    return Trainer(job, plan, run, state, Show(plan.loop))


def settings(text: Path, seed: int) -> Train:
    from oneblock.train.options import Loop, Optimizer, Schedule, Sizes, Start, Train, Watch

    return Train(
        data=(text,),
        val_share=0.02,
        tokenizer="bpe",
        vocab=1024,
        context=128,
        sizes=Sizes(dim=192, n_layers=4, n_heads=6, n_kv_heads=2, hidden_dim=512),
        loop=Loop(batch_size=24, seed=seed),
        start=Start(zero_init_residual=True, embed_std=0.3),
        optimizer=Optimizer("muon", lr=3e-2, matrix_lr=2e-2, beta2=0.95, momentum=0.9),
        schedule=Schedule("wsd", warmup=10, decay=0.5),
        watch=Watch(eval_every=0, eval_batches=16, save_every=0),
    )


def timed(plan: Train, seconds: float) -> Train:
    from dataclasses import replace

    return replace(plan, loop=replace(plan.loop, seconds=seconds))


class Looks:
    """Shows what the model writes at a few points of the run, and keeps the steps fast."""

    def __init__(self, session: Trainer):
        self.session, self.due = session, list(LOOKS)
        self.threads, self.last = Threads(), time.perf_counter()

    def look(self, state: State, metrics: Metrics) -> None:
        if state.step > 1:  # the first step also sets things up
            self.threads.after(metrics.seconds, time.perf_counter() - self.last)
        progress = metrics.seconds / (self.session.options.loop.seconds or 1)
        if self.due and progress >= self.due[0]:
            self.due = [share for share in self.due if share > progress]
            show = self.session.show
            show.note(f"\nafter {state.step:,} steps (loss {float(metrics.loss):.2f}) it writes:", "bold")
            with self.threads.one():  # a token at a time is too little work to share
                show.code(self.session.sample("def", 60))
                self.session.validate()
        self.last = time.perf_counter()


class Threads:
    """Chooses for every step between all threads and one, by how long each took when last tried.

    On a machine that is busy with other things one thread is many times as fast as all of them: threads wait for each
    other after every operation, and the one that does not get a core holds up the rest. (Sums are rounded differently
    with another number of threads, so what must be repeatable to the bit cannot do this.)
    """

    RETRY = 40  # the slower way is tried again when it would be one in this many steps' time

    def __init__(self) -> None:
        import torch

        self.set = torch.set_num_threads
        self.took = {torch.get_num_threads(): 0.0, 1: 0.0}
        self.tried = dict.fromkeys(self.took, 0.0)
        self.now = max(self.took)

    @contextmanager
    def one(self) -> Iterator[None]:
        self.set(1)
        yield
        self.set(self.now)

    def after(self, now: float, took: float) -> None:
        """A step took this long and ended `now` seconds into the run: choose for the next."""
        self.took[self.now], self.tried[self.now] = took, now
        stale = [n for n in self.took if now - self.tried[n] > self.RETRY * self.took[n]]
        self.now = stale[0] if stale else min(self.took, key=lambda n: self.took[n])
        self.set(self.now)


def write(session: Trainer) -> None:
    """The end of the demonstration: the loss on text it has not seen, and a few completions."""
    import torch

    session.validate()
    session.picture()
    torch.set_num_threads(1)
    session.show.note("\nIt goes on from a few beginnings:", "bold")
    for prompt in PROMPTS:
        session.show.code(session.sample(prompt, 70))


# ------------------------------------------------------------------ the text


def corpus() -> str:
    """The sources of the standard library, in the order of their names, up to SIZE characters."""
    parts, size = [], 0
    for path in sources():
        text = path.read_text(encoding="utf-8", errors="replace").strip().replace("\0", "")
        if text and size + len(text) <= SIZE:
            parts.append(text)
            size += len(text) + 3
    if not parts:
        raise OneblockError(
            "this Python comes without the sources of its library: use `oneblock train --data FILE` on a text of yours"
        )
    return "\n\n\n".join(parts) + "\n"


def sources() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        if not LEFT_OUT & set(path.relative_to(root).parts):
            yield path


def folder(out: Path | None) -> Path:
    from oneblock.train.run import new_folder

    if out is None:
        out, number = Path("runs/demo"), 1
        while out.exists():
            number += 1
            out = Path(f"runs/demo-{number}")
    return new_folder(out)


# ------------------------------------------------------------------ what to do next


def command() -> str:
    """How to start this program again: by name where that works, else by its path."""
    if shutil.which("oneblock"):
        return "oneblock"
    beside = Path(sys.executable).parent / "oneblock"
    if not beside.exists():
        return f"{sys.executable} -m oneblock"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def farewell(run: Path) -> str:
    me = command()
    rows = (
        (f"{me} chat {run}/latest", "begin a line of Python, and it goes on"),
        (f"{me} compare {run}/latest gpt2 llama-3-8b", "what it costs beside its big relatives"),
        (f"{me} train --data FILE.txt", "train on a text of your own"),
    )
    width = max(len(row[0]) for row in rows)
    lines = "\n".join(f"  {line:<{width}}   {words}" for line, words in rows)
    return f"The loss curve is in {run}/loss.png. What to do next:\n\n{lines}"
