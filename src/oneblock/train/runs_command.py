"""`oneblock runs`: the runs in a folder, and several of them side by side."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from oneblock.config import nearest
from oneblock.errors import OneblockError
from oneblock.train.options import Train
from oneblock.train.plot import Row, draw_runs
from oneblock.train.progress import clock, size
from oneblock.train.run import CONFIG, METRICS, PATHS, Results, read, recorded, results, settings

WIDTH = 120  # columns, where there is no terminal
ACTIONS = ("list", "compare")


@dataclass(frozen=True)
class Runs:
    """List the runs in a folder, or plot several together and print what they differ in."""

    action: Positional[str]  # list, or compare
    paths: Positional[tuple[Path, ...]] = ()  # list: a folder, else runs; compare: the runs' folders
    out: Path = Path("compare.png")  # compare: the picture
    x: Literal["tokens", "time", "steps"] = "tokens"  # compare: what losses are drawn over
    json: bool = False  # print rows as JSON


@dataclass(frozen=True)
class Measured:
    """A run as its folder has it."""

    folder: Path
    name: str
    options: Train
    rows: list[Row]
    results: Results


def runs(options: Runs) -> None:
    """List runs, or compare them."""
    if options.action not in ACTIONS:
        hint = nearest(options.action, ACTIONS) or ": say list or compare"
        raise OneblockError(f"oneblock runs has no {options.action!r}{hint}")
    (list_runs if options.action == "list" else compare)(options)


def list_runs(options: Runs) -> None:
    if len(options.paths) > 1:
        raise OneblockError("oneblock runs list takes one folder; oneblock runs compare takes several runs")
    folder = options.paths[0] if options.paths else Path("runs")
    if not folder.is_dir():
        raise OneblockError(f"{folder} is no folder: oneblock runs list takes the one that runs are in")
    folders = sorted((path.parent for path in folder.glob(f"*/{CONFIG}")), key=lambda path: path.stat().st_mtime)
    found = [measured(path) for path in folders]
    if not found:
        raise OneblockError(f"there are no runs in {folder}; oneblock train begins one")
    show(found, options, side_by_side=False)


def compare(options: Runs) -> None:
    """A picture with all their losses, and a table."""
    if len(options.paths) < 2:
        raise OneblockError("give at least two runs: oneblock runs compare runs/1 runs/2 (oneblock runs list)")
    found = [measured(path) for path in options.paths]
    for run in found:
        if not any("loss" in row or "val" in row for row in run.rows):
            raise OneblockError(f"{run.folder} has measured nothing yet: there are no losses in its {METRICS}")
    draw_runs({name: run.rows for name, run in zip(names(found), found, strict=True)}, options.out, options.x)
    show(found, options, side_by_side=True)
    if not options.json:
        print(f"drawn in {options.out}")


def measured(folder: Path) -> Measured:
    if not (folder / CONFIG).is_file():
        raise OneblockError(f"{folder} is no run: it has no {CONFIG}")
    rows = list(read(folder / METRICS))
    return Measured(folder, folder.resolve().name, recorded(folder), rows, results(rows))


def names(found: Sequence[Measured]) -> list[str]:
    """Their folders' names, or as much of the paths as tells them apart."""
    parts = [run.folder.resolve().parts for run in found]
    length = 1
    while len({p[-length:] for p in parts}) < len(set(parts)):
        length += 1
    short = ["/".join(p[-length:]) for p in parts]
    return [name if short.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(short)]


def differing(found: Sequence[Measured]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with each one's."""
    every = [settings(run.options) for run in found]
    keys = [key for key in every[0] if key not in PATHS or key in ("data", "val")]
    return {key: [e[key] for e in every] for key in keys if len({repr(e[key]) for e in every}) > 1}


# ------------------------------------------------------------------ tables

FIGURES: dict[str, Callable[[Results], str | None]] = {
    "steps": lambda r: f"{r.steps:,}",
    "tokens": lambda r: f"{r.tokens:,}",
    "time": lambda r: clock(r.seconds),
    "training loss": lambda r: maybe(r.loss, ".4f"),
    "validation loss": lambda r: maybe(r.val, ".4f"),
    "  the best": lambda r: None if r.best is None else f"{r.best:.4f} at {r.best_step:,}",
    "  averaged weights": lambda r: maybe(r.val_ema, ".4f"),
    "tokens/s": lambda r: maybe(r.speed, ",.0f"),
    "MFU": lambda r: maybe(r.mfu, ".1%"),
    "memory": lambda r: None if r.memory is None else size(r.memory),
}
LISTED = ("steps", "tokens", "time", "validation loss", "tokens/s", "MFU")


def maybe(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def show(found: Sequence[Measured], options: Runs, side_by_side: bool) -> None:
    differ = differing(found)
    if options.json:
        rows = [
            {
                "run": str(run.folder),
                **asdict(run.results),
                "settings": {key: value[i] for key, value in differ.items()},
            }
            for i, run in enumerate(found)
        ]
        print(jsonlib.dumps(rows, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, WIDTH))
    console.print(columns(found, differ) if side_by_side else lines(found))


def columns(found: Sequence[Measured], differ: dict[str, list[Any]]) -> Table:
    """A column for each run: what came out, and below what they differ in."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in names(found):
        table.add_column(Text(name, "cyan"), justify="right", overflow="fold")
    for name, words in FIGURES.items():
        cells = [words(run.results) for run in found]
        if any(cells):
            table.add_row(name, *(cell or "-" for cell in cells))
    table.add_section()
    for key, values in differ.items():
        table.add_row(key, *(Text("-" if value is None else str(value)) for value in values))
    return table


def lines(found: Sequence[Measured]) -> Table:
    """A line for each run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", style="cyan", overflow="fold")
    table.add_column("model")
    for name in LISTED:
        table.add_column(name, justify="right")
    for run in found:
        cells = (FIGURES[name](run.results) or "-" for name in LISTED)
        table.add_row(Text(run.name), run.options.model, *cells)
    return table
