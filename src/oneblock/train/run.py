"""A run's folder: what was asked for, what was measured, a picture, and its checkpoints.

config.toml      the settings, as `--config` takes them
metrics.jsonl    a line for each look at the losses
nonfinite.jsonl  a line for each step that was no number, where there was one
tensorboard/     the same for TensorBoard
report.md        what was trained, on what, and what came out
loss.png         the loss over steps
curves.png       over tokens and time; throughput, gradient, learning rate
step-000500/     checkpoints: Hugging Face folders with the tokenizer and the optimizer's state
latest           the newest of them
ema/             the averaged weights at the end, where an average was kept
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from oneblock.config import load_toml, to_toml
from oneblock.errors import OneblockError
from oneblock.files import write_file
from oneblock.train.options import Train
from oneblock.train.plot import Row, draw, draw_all, smooth

CONFIG, METRICS, PICTURE, CURVES = "config.toml", "metrics.jsonl", "loss.png", "curves.png"
PATHS = ("data", "val", "out", "resume", "config", "dry_run")  # not settings of how something is learned


def new_folder(out: Path | None) -> Path:
    """The folder asked for, which must be new or empty, or `runs/N` with the next free number."""
    if out is None:
        taken = [int(p.name) for p in Path("runs").glob("[0-9]*") if p.name.isdigit()]
        out = Path("runs") / str(max(taken, default=0) + 1)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OneblockError(f"{out} exists: choose another --out, or go on with --resume {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OneblockError(f"cannot create {out}: {e.strerror}") from None
    return out


def record(run: Path, options: Train) -> None:
    """Write the settings; paths are made absolute, so that a run can be resumed from anywhere."""
    kept = replace(
        options,
        data=tuple(path.absolute() for path in options.data),
        val=tuple(path.absolute() for path in options.val),
        **{"out": None, "resume": None, "config": None, "dry_run": False},
    )
    write_file(run / CONFIG, to_toml(kept))


def recorded(run: Path) -> Train:
    return load_toml(Train, run / CONFIG)


def settings(options: Any) -> dict[str, Any]:
    """All settings in one dict that JSON can hold."""
    found: dict[str, Any] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            found |= settings(value)
        else:
            found[f.name] = value if isinstance(value, int | float | str | None) else str(value)
    return found


class Log:
    """`metrics.jsonl`, a line at a time."""

    def __init__(self, run: Path, step: int = 0, silent: bool = False):
        """Go on after `step`: what a stopped run wrote past its last checkpoint will be measured again.

        `silent`: keep rows without writing them; another process does.
        """
        self.silent = silent
        self.path = run / METRICS
        self.rows = [row for row in read(self.path) if row["step"] <= step]
        if silent:
            return
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> Row:
        """Write a line, and what was written: what is no number is left out, since JSON has none."""
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
    """The whole lines of a log; one cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


@dataclass(frozen=True)
class Results:
    """What came of a run, read off its rows; None: not measured."""

    steps: int
    tokens: int
    seconds: float
    loss: float | None  # of training: the end of the smoothed curve
    val: float | None  # the last
    best: float | None  # the lowest validation loss, and its step
    best_step: int | None
    val_ema: float | None
    speed: float | None  # tokens per second: the median of all looks
    mfu: float | None
    memory: int | None  # bytes, the most


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
