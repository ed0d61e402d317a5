"""`oneblock data`: prepare text as token shards, check them, look at them."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from oneblock.config import nearest
from oneblock.errors import OneblockError

if TYPE_CHECKING:
    from oneblock.data.prepare import Report
    from oneblock.data.shards import Shards
    from oneblock.text import Tokenizer

ACTIONS = ("prepare", "verify", "show")


@dataclass(frozen=True)
class Data:
    """Prepare text for training (--data FILES --tokenizer FOLDER --out FOLDER), verify prepared data, or show it."""

    action: Positional[str]  # prepare, verify or show
    folder: Positional[Path | None] = None  # verify, show: prepared data
    data: tuple[str, ...] = ()  # prepare: .txt, .jsonl, .jsonl.gz, .parquet, or hf:NAME[:CONFIG[:SPLIT]]
    tokenizer: str = ""  # prepare: a folder with a tokenizer, or bytes
    out: Path | None = None  # prepare: the new folder; the same again goes on with a job that was stopped
    field: str = "text"  # of a line or row, that has the document
    separator: str = ""  # between documents of a text file; without it each file is one
    shard_tokens: int = 100_000_000
    workers: int = 0  # processes that tokenise; 0: as many as there are cores
    val_share: float = 0.0  # of the documents, kept apart in OUT/val
    skip_empty: bool = False  # pass over documents without text, instead of stopping
    seed: int = 0  # of which documents are kept apart
    json: bool = False  # verify, show: print as JSON


def data(options: Data) -> None:
    """Prepare, verify or show."""
    actions = {"prepare": prepare_data, "verify": verify_data, "show": show_data}
    if options.action not in actions:
        hint = nearest(options.action, actions) or f": say {', '.join(actions)}"
        raise OneblockError(f"oneblock data has no {options.action!r}{hint}")
    actions[options.action](options)


# ------------------------------------------------------------------ prepare


def prepare_data(options: Data) -> None:
    from oneblock.data.prepare import Plan, prepare
    from oneblock.data.shards import read_shards
    from oneblock.data.sources import Reading

    if not options.data or options.out is None or not options.tokenizer:
        raise OneblockError("oneblock data prepare needs --data FILES, --tokenizer FOLDER (or bytes) and --out FOLDER")
    if options.shard_tokens < 1 or not 0 <= options.val_share < 1:
        raise OneblockError("--shard-tokens must be at least 1, and --val-share at least 0 and below 1")
    reading = Reading(options.field, options.separator)
    kept = (options.shard_tokens, options.val_share, options.seed, options.skip_empty)
    plan, workers = Plan(options.data, reading, *kept), options.workers or os.cpu_count() or 1
    with progress() as report:
        prepare(plan, tokenizer_of(options.tokenizer), options.out, workers, report)
    for folder in (options.out, options.out / "val"):
        if folder.exists():
            print(line(read_shards(folder)))


def tokenizer_of(name: str) -> Tokenizer:
    from oneblock.text import Tokenizer
    from oneblock.text.train import byte_level

    return byte_level() if name == "bytes" else Tokenizer.load(name)


@contextmanager
def progress() -> Iterator[Report]:
    """A live line in a terminal; silence elsewhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenising")

        def report(documents: int, tokens: int) -> None:
            elapsed = max(bar.tasks[0].elapsed or 0.0, 1e-9)
            rate = f"{tokens / elapsed / 1e6:.2f} M tokens/s"
            bar.update(task, description=f"{documents:,} documents, {tokens:,} tokens, {rate}")

        yield report


# ------------------------------------------------------------------ look


def folder_of(options: Data) -> Path:
    if options.folder is None:
        raise OneblockError(f"oneblock data {options.action} needs a folder of prepared data")
    return options.folder


def verify_data(options: Data) -> None:
    from oneblock.data.shards import read_shards
    from oneblock.store.manifest import verify

    found = read_shards(folder_of(options))
    verify(found.folder)
    print(jsonlib.dumps(summary(found)) if options.json else f"{line(found)}: as it was written")


def show_data(options: Data) -> None:
    import numpy as np

    from oneblock.data.shards import read_shards

    found = read_shards(folder_of(options))
    if options.json:
        print(jsonlib.dumps(summary(found)))
        return
    ids = found.open()
    first = found.tokenizer.decode(ids.take(np.array([0]), min(60, len(ids)))[0].tolist(), skip_special=False)
    print(
        f"{line(found)}\ntokenizer {found.fingerprint}, {found.vocab:,} tokens, stored as {found.dtype}\n{first!r} .."
    )


def line(found: Shards) -> str:
    return f"{found.folder}: {found.tokens:,} tokens in {found.documents:,} documents"


def summary(found: Shards) -> dict[str, object]:
    return {**asdict(found), "folder": str(found.folder)}
