"""The run folder: options, metrics, plots and checkpoints.

config.toml      the options, as `--config` takes them
metrics.jsonl    one line per log interval and validation
nonfinite.jsonl  one line per step with a NaN or Inf loss or gradient
tensorboard/     the metrics as TensorBoard event files
report.md        data, settings, results
loss.png         loss over steps
curves.png       loss over tokens and time; throughput, gradient norm, learning rate
step-000500/     a checkpoint: a Hugging Face folder with tokenizer and optimizer state
latest           link to the newest checkpoint
ema/             the EMA weights after the last step, with --ema
.lock            locked by the process that writes the run
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from oneblock.config import load_toml, to_toml
from oneblock.errors import OneblockError
from oneblock.files import write_file
from oneblock.train.options import Train, flatten
from oneblock.train.plot import Row, draw, draw_all, smooth

CONFIG, METRICS, PICTURE, CURVES, LOCK = "config.toml", "metrics.jsonl", "loss.png", "curves.png", ".lock"
PATHS = ("data", "val", "out", "resume", "config", "dry_run", "allow_changes")  # options that are not settings


def new_folder(out: Path | None) -> Path:
    """Create `out`, which must be absent or empty, or `runs/N` with the next free number."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OneblockError(f"{out} exists: choose another --out, or continue it with --resume {out}")
    try:
        if out is None:
            return next_folder(Path("runs"))
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OneblockError(f"cannot create {out or 'runs'}: {e.strerror}") from None
    return out


def next_folder(parent: Path) -> Path:
    """Create the numbered folder after the last one; processes that start together get one each."""
    number = max((int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        except FileExistsError:
            continue


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run folder's lock; the system releases it however the process ends.

    OneblockError where another process holds it. A POSIX lock belongs to one process, so that forked loader workers
    cannot outlive it with the lock.
    """
    with (run / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise OneblockError(f"another process trains in {run}: stop it, or choose another --out") from None
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # file systems without locks
                raise
        yield


def record(run: Path, options: Train) -> None:
    """Write config.toml; paths are made absolute, so that a run can be resumed from any directory."""
    recorded = replace(
        options,
        data=tuple(path.absolute() for path in options.data),
        val=tuple(path.absolute() for path in options.val),
        **{"out": None, "resume": None, "config": None, "dry_run": False, "allow_changes": False},
    )
    write_file(run / CONFIG, to_toml(recorded))


def recorded(run: Path) -> Train:
    return load_toml(Train, run / CONFIG)


def settings(options: Any) -> dict[str, Any]:
    """All options in one flat dict of JSON values."""
    values = flatten(options).items()
    return {key: value if isinstance(value, int | float | str | None) else str(value) for key, value in values}


class Log:
    """Writer of `metrics.jsonl`."""

    def __init__(self, run: Path, step: int = 0, silent: bool = False):
        """Keep the rows up to `step`: those after the checkpoint that a run resumes from are measured again.

        `silent`: collect rows without writing them, as ranks other than the first do.
        """
        self.silent = silent
        self.path = run / METRICS
        self.rows = [row for row in read(self.path) if row["step"] <= step]
        if silent:
            return
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> Row:
        """Append a row and return it without its NaN and Inf values, which JSON lacks."""
        row = {key: value for key, value in row.items() if math.isfinite(value)}
        self.rows.append(row)
        if self.silent:
            return row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def picture(self, title: str) -> Path:
        path = self.path.with_name(PICTURE)
        draw(self.rows, path, title)
        draw_all(self.rows, path.with_name(CURVES), title)
        return path


def read(path: Path) -> Iterator[Row]:
    """The rows of a log, without a last line that a kill cut short."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


@dataclass(frozen=True)
class Results:
    """Results of a run, from its rows; None: not measured."""

    steps: int
    tokens: int
    seconds: float
    loss: float | None  # training loss, smoothed, at the end
    val: float | None  # last validation loss
    best: float | None  # lowest validation loss
    best_step: int | None
    val_ema: float | None
    speed: float | None  # tokens per second, median
    mfu: float | None
    memory: int | None  # peak bytes


def results(rows: Sequence[Row]) -> Results:
    def column(key: str) -> list[float]:
        return [row[key] for row in rows if key in row]

    def middle(key: str) -> float | None:
        return median(column(key)) if column(key) else None

    def last(key: str) -> float | None:
        return column(key)[-1] if column(key) else None

    best = min(((row["val"], int(row["step"])) for row in rows if "val" in row), default=(None, None))
    return Results(
        steps=int(max(column("step"), default=0)),
        tokens=int(max(column("tokens"), default=0)),
        seconds=max(column("seconds"), default=0.0),
        loss=smooth(column("loss"))[-1] if column("loss") else None,
        val=last("val"),
        best=best[0],
        best_step=best[1],
        val_ema=last("val_ema"),
        speed=middle("speed"),
        mfu=middle("mfu"),
        memory=int(max(column("memory"))) if column("memory") else None,
    )
