"""`oneblock runs`: list the runs of a folder, or compare several."""

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
from oneblock.train.run import CONFIG, METRICS, PATHS, Results, read, recorded, results, settings
from oneblock.units import format_bytes, format_clock

PIPE_WIDTH = 1000  # columns of a pipe: no table is wider
ACTIONS = ("list", "compare")


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder, or plot several together and print the settings in which they differ."""

    action: Positional[str]  # list or compare
    paths: Positional[tuple[Path, ...]] = ()  # list: a folder of runs, by default runs; compare: folders of runs
    out: Path = Path("compare.png")  # compare: file of the plot
    x: Literal["tokens", "time", "steps"] = "tokens"  # compare: x axis of the plot
    json: bool = False  # print the rows as JSON


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder records it."""

    folder: Path
    name: str
    options: Train
    rows: list[Row]
    results: Results


def runs(options: Runs) -> None:
    """List runs, or compare them."""
    if options.action not in ACTIONS:
        hint = nearest(options.action, ACTIONS) or ": use list or compare"
        raise OneblockError(f"oneblock runs has no action {options.action!r}{hint}")
    (list_runs if options.action == "list" else compare_runs)(options)


def list_runs(options: Runs) -> None:
    if len(options.paths) > 1:
        raise OneblockError("oneblock runs list takes one folder; oneblock runs compare takes several runs")
    folder = options.paths[0] if options.paths else Path("runs")
    if not folder.is_dir():
        raise OneblockError(f"{folder} is not a folder: oneblock runs list takes the folder that holds the runs")
    folders = sorted((path.parent for path in folder.glob(f"*/{CONFIG}")), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise OneblockError(f"no runs in {folder}; oneblock train starts one")
    print_runs([read_run(path) for path in folders], options, run_rows)


def compare_runs(options: Runs) -> None:
    """Plot the losses of several runs and print their results side by side."""
    if len(options.paths) < 2:
        raise OneblockError("give at least two runs: oneblock runs compare runs/1 runs/2 (oneblock runs list)")
    records = [read_run(path) for path in options.paths]
    for run in records:
        if not any("loss" in row or "val" in row for row in run.rows):
            raise OneblockError(f"{run.folder} has no losses in its {METRICS} yet")
    draw_runs(dict(zip(short_names(records), (run.rows for run in records), strict=True)), options.out, options.x)
    print_runs(records, options, run_columns)
    if not options.json:
        print(f"plot written to {options.out}")


def read_run(folder: Path) -> RunRecord:
    if not (folder / CONFIG).is_file():
        raise OneblockError(f"{folder} is not a run: it has no {CONFIG}")
    rows = list(read(folder / METRICS))
    return RunRecord(folder, folder.resolve().name, recorded(folder), rows, results(rows))


def short_names(records: Sequence[RunRecord]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    parts = [run.folder.resolve().parts for run in records]
    length = 1
    while len({p[-length:] for p in parts}) < len(set(parts)):
        length += 1
    short = ["/".join(p[-length:]) for p in parts]
    return [name if short.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(short)]


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Settings that differ between the runs, with the value of each run."""
    every = [settings(run.options) for run in records]
    names = [name for name in every[0] if name not in PATHS or name in ("data", "val")]
    return {name: [e[name] for e in every] for name in names if len({repr(e[name]) for e in every}) > 1}


# ------------------------------------------------------------------ tables

FIGURES: dict[str, Callable[[Results], str | None]] = {
    "steps": lambda r: f"{r.steps:,}",
    "tokens": lambda r: f"{r.tokens:,}",
    "time": lambda r: format_clock(r.seconds),
    "training loss": lambda r: format_optional(r.loss, ".4f"),
    "validation loss": lambda r: format_optional(r.val, ".4f"),
    "  the best": lambda r: None if r.best is None else f"{r.best:.4f} at {r.best_step:,}",
    "  EMA weights": lambda r: format_optional(r.val_ema, ".4f"),
    "tokens/s": lambda r: format_optional(r.speed, ",.0f"),
    "MFU": lambda r: format_optional(r.mfu, ".1%"),
    "peak memory": lambda r: None if r.memory is None else format_bytes(r.memory),
}
LISTED = ("steps", "tokens", "time", "validation loss", "tokens/s", "MFU")


def format_optional(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def print_runs(records: Sequence[RunRecord], options: Runs, layout: Callable[[Sequence[RunRecord]], Table]) -> None:
    """Print the runs as a table, or as JSON with the settings in which they differ."""
    if options.json:
        differing = differing_settings(records)
        rows = [
            {"run": str(run.folder), **asdict(run.results), "settings": {name: v[i] for name, v in differing.items()}}
            for i, run in enumerate(records)
        ]
        print(jsonlib.dumps(rows, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, PIPE_WIDTH))
    console.print(layout(records))


def run_columns(records: Sequence[RunRecord]) -> Table:
    """A column per run: results, then the settings in which they differ."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in short_names(records):
        table.add_column(Text(name, "cyan"), justify="right", overflow="fold")
    for name, figure in FIGURES.items():
        cells = [figure(run.results) for run in records]
        if any(cells):
            table.add_row(name, *(cell or "-" for cell in cells))
    table.add_section()
    for name, values in differing_settings(records).items():
        table.add_row(name, *(Text("-" if value is None else str(value)) for value in values))
    return table


def run_rows(records: Sequence[RunRecord]) -> Table:
    """A row per run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", style="cyan", overflow="fold")
    table.add_column("model")
    for name in LISTED:
        table.add_column(name, justify="right")
    for run in records:
        cells = (FIGURES[name](run.results) or "-" for name in LISTED)
        table.add_row(Text(run.name), run.options.model, *cells)
    return table
