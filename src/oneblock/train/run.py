"""A run's folder: what was asked for, what was measured, a picture, and its checkpoints.

config.toml     the settings, as `--config` takes them
metrics.jsonl   a line for each look at the losses
loss.png        the picture of it
step-000500/    checkpoints: Hugging Face folders with the tokenizer and the optimizer's state
latest          the newest of them
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from oneblock.config import load_toml, to_toml
from oneblock.errors import OneblockError
from oneblock.train.options import Train
from oneblock.train.plot import draw

CONFIG, METRICS, PICTURE = "config.toml", "metrics.jsonl", "loss.png"


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
    (run / CONFIG).write_text(to_toml(kept), encoding="utf-8")


def recorded(run: Path) -> Train:
    return load_toml(Train, run / CONFIG)


class Log:
    """`metrics.jsonl`, a line at a time."""

    def __init__(self, run: Path, step: int = 0):
        """Go on after `step`: what a stopped run wrote past its last checkpoint will be measured again."""
        self.path = run / METRICS
        self.rows = [row for row in read(self.path) if row["step"] <= step]
        new = self.path.with_name(f".{METRICS}.new")
        new.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(new, self.path)

    def add(self, **row: float) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def picture(self, title: str) -> Path:
        path = self.path.with_name(PICTURE)
        draw(self.rows, path, title)
        return path


def read(path: Path) -> Iterator[dict[str, float]]:
    """The whole lines of a log; one cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
