"""`oneblock demo`: train a small Llama on the source of Python's standard library, and sample from it."""

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
from typing import TYPE_CHECKING, Annotated

from oneblock.config import SEED, Range, check_ranges
from oneblock.errors import OneblockError

if TYPE_CHECKING:
    from oneblock.train.loop import Metrics, State
    from oneblock.train.options import Train
    from oneblock.train.trainer import Trainer

SIZE = 6_000_000  # characters of training text
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "_bundled",
}
RESERVE = 8.0  # seconds for the last validation, the picture and the completions
SAMPLE_AT = (0.03, 0.15, 0.4, 0.7)  # shares of the run after which samples are shown
PROMPTS = ("class", "    def __init__(self", "    for", "import")


@dataclass(frozen=True)
class Demo:
    """Train a small Llama on Python's standard library, without a download or a GPU, and sample from it."""

    seconds: Annotated[float, Range(15, 86_400)] = 90.0  # length of the demonstration, preparation included
    out: Path | None = None  # the run's folder; default runs/demo, or runs/demo-N
    seed: Annotated[int, SEED] = 0  # seed of the initial weights and of the batches


def demo(options: Demo) -> None:
    from oneblock.train.run import lock_run

    began = time.perf_counter()
    check_ranges(options)
    run = make_folder(options.out)
    text = run / f"python-{platform.python_version()}.txt"
    text.write_text(corpus(), encoding="utf-8")
    print(f"Training on the source of the standard library of Python {platform.python_version()}.")
    with lock_run(run):
        trainer = build_trainer(run, text, options, began)
        if not trainer.go(Sampler(trainer).observe):
            print(f"stopped and saved; go on with: {command()} train --resume {run}", file=sys.stderr)
            raise SystemExit(130)
        finish(trainer)
    print(f"\nDone in {time.perf_counter() - began:.0f} seconds. {next_steps(run)}")


def build_trainer(run: Path, text: Path, options: Demo, began: float) -> Trainer:
    from oneblock.train.build import build_state
    from oneblock.train.commands import summary
    from oneblock.train.prepare import prepare
    from oneblock.train.progress import ProgressDisplay
    from oneblock.train.run import record
    from oneblock.train.trainer import Trainer

    plan = settings(text, options.seed)
    job = prepare(plan)
    state = build_state(job, plan)
    left = options.seconds - (time.perf_counter() - began) - RESERVE
    plan = limit_time(plan, max(left, 5.0))
    record(run, plan)
    print(summary(job, plan) + "\n")
    return Trainer(job, plan, run, state, ProgressDisplay(plan.loop))


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


def limit_time(plan: Train, seconds: float) -> Train:
    from dataclasses import replace

    return replace(plan, loop=replace(plan.loop, seconds=seconds))


class Sampler:
    """Shows a sample at a few points of the run, and chooses the number of threads after every step."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.due = trainer, list(SAMPLE_AT)
        self.threads, self.last = ThreadChoice(), time.perf_counter()

    def observe(self, state: State, metrics: Metrics) -> None:
        if state.step > 1:  # the first step includes set-up
            self.threads.record(metrics.seconds, time.perf_counter() - self.last)
        progress = metrics.seconds / (self.trainer.options.loop.seconds or 1)
        if self.due and progress >= self.due[0]:
            self.due = [share for share in self.due if share > progress]
            show = self.trainer.show
            show.note(f"\nafter {state.step:,} steps (loss {float(metrics.loss):.2f}) a sample:", "bold")
            with self.threads.single():  # decoding one token is too little work for several threads
                show.code(self.trainer.sample("def", 60))
                self.trainer.validate()
        self.last = time.perf_counter()


class ThreadChoice:
    """Chooses all threads or one for every step, by the time each took when last tried.

    On a busy machine one thread can be many times as fast as all: threads synchronise after every operation, and one
    that gets no core stalls the others. Sums round differently with another number of threads, so runs that must be
    reproducible to the bit cannot do this.
    """

    RETRY = 40  # the slower choice is tried again after this many times its step time

    def __init__(self) -> None:
        import torch

        self.set = torch.set_num_threads
        self.step_seconds = {torch.get_num_threads(): 0.0, 1: 0.0}
        self.tried = dict.fromkeys(self.step_seconds, 0.0)
        self.now = max(self.step_seconds)

    @contextmanager
    def single(self) -> Iterator[None]:
        self.set(1)
        yield
        self.set(self.now)

    def record(self, now: float, seconds: float) -> None:
        """Record a step that ended `now` seconds into the run, and choose for the next."""
        self.step_seconds[self.now], self.tried[self.now] = seconds, now
        stale = [n for n in self.step_seconds if now - self.tried[n] > self.RETRY * self.step_seconds[n]]
        self.now = stale[0] if stale else min(self.step_seconds, key=lambda n: self.step_seconds[n])
        self.set(self.now)


def finish(trainer: Trainer) -> None:
    """Validate, write plot and report with that validation, and show a few completions."""
    import torch

    from oneblock.train.report import write as write_report

    trainer.validate()
    trainer.plot()
    torch.set_num_threads(1)
    trainer.show.note("\ncompletions:", "bold")
    completions = [trainer.sample(prompt, 70) for prompt in PROMPTS]
    for completion in completions:
        trainer.show.code(completion)
    write_report(trainer, completions[0])


# ------------------------------------------------------------------ the text


def corpus() -> str:
    """The source of the standard library in the order of file names, up to SIZE characters."""
    parts, size = [], 0
    for path in sources():
        text = path.read_text(encoding="utf-8", errors="replace").strip().replace("\0", "")
        if text and size + len(text) <= SIZE:
            parts.append(text)
            size += len(text) + 3
    if not parts:
        raise OneblockError(
            "this Python has no source of its standard library: run `oneblock train --data FILE` on your own text"
        )
    return "\n\n\n".join(parts) + "\n"


def sources() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            yield path


def make_folder(out: Path | None) -> Path:
    from oneblock.train.run import new_folder

    if out is None:
        out, number = Path("runs/demo"), 1
        while out.exists():
            number += 1
            out = Path(f"runs/demo-{number}")
    return new_folder(out)


# ------------------------------------------------------------------ next steps


def command() -> str:
    """The command that starts this program: its name if it is on the PATH, else its path."""
    if shutil.which("oneblock"):
        return "oneblock"
    beside = Path(sys.executable).parent / "oneblock"
    if not beside.exists():
        return f"{sys.executable} -m oneblock"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def next_steps(run: Path) -> str:
    program = command()
    rows = (
        (f"{program} chat {run}/latest", "complete lines of Python interactively"),
        (f"{program} compare {run}/latest gpt2 llama-3-8b", "its cost beside large models"),
        (f"{program} train --data FILE.txt", "train on your own text"),
    )
    width = max(len(row[0]) for row in rows)
    lines = "\n".join(f"  {line:<{width}}   {words}" for line, words in rows)
    return f"The loss curve is in {run}/loss.png. Next:\n\n{lines}"
