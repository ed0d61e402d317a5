"""`oneblock data`: tokenize text into shards, verify shards, show their statistics."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from oneblock.config import SEED, Range, check_ranges, nearest
from oneblock.errors import OneblockError

if TYPE_CHECKING:
    from oneblock.data.prepare import Report
    from oneblock.data.shards import ShardFolder
    from oneblock.text import Tokenizer


@dataclass(frozen=True)
class DataOptions:
    """Tokenize text into shards for training, verify shards, or show their statistics."""

    action: Positional[str]  # prepare, verify or show
    folder: Positional[Path | None] = None  # verify, show: folder of prepared data
    data: tuple[str, ...] = ()  # prepare: .txt, .jsonl, .jsonl.gz or .parquet files, or hf:NAME[:CONFIG[:SPLIT]]
    tokenizer: str = ""  # prepare: folder with a tokenizer, or bytes
    out: Path | None = None  # prepare: new folder; the same options and folder resume a stopped job
    text_field: str = "text"  # prepare: field of a JSON line, or column of a table, with the document
    separator: str = ""  # prepare: string between the documents of a text file; default: the file is one document
    shard_tokens: Annotated[int, Range(low=1)] = 100_000_000  # prepare: tokens of a shard
    workers: Annotated[int, Range(low=0, high=1024)] = 0  # prepare: processes that tokenize; 0: one for each core
    val_share: Annotated[float, Range(low=0, below=1)] = 0.0  # prepare: share of the documents held out in OUT/val
    skip_empty: bool = False  # prepare: skip documents without text instead of stopping
    seed: Annotated[int, SEED] = 0  # prepare: seed of the held-out documents
    json: bool = False  # verify, show: print JSON

    __post_init__ = check_ranges


def data(options: DataOptions) -> None:
    """Run the command."""
    actions = {"prepare": prepare_data, "verify": verify_data, "show": show_data}
    if options.action not in actions:
        hint = nearest(options.action, actions) or f": use {', '.join(actions)}"
        raise OneblockError(f"oneblock data has no action {options.action!r}{hint}")
    actions[options.action](options)


def prepare_data(options: DataOptions) -> None:
    from oneblock.data.documents import DocumentFormat
    from oneblock.data.prepare import PrepareOptions, prepare_shards
    from oneblock.data.shards import read_shard_folder

    if not options.data or options.out is None or not options.tokenizer:
        raise OneblockError("oneblock data prepare needs --data FILES, --tokenizer FOLDER (or bytes) and --out FOLDER")
    settings = PrepareOptions(
        options.data,
        DocumentFormat(options.text_field, options.separator),
        options.shard_tokens,
        options.val_share,
        options.seed,
        options.skip_empty,
    )
    workers = options.workers or os.cpu_count() or 1
    with show_progress() as report:
        prepare_shards(settings, load_tokenizer(options.tokenizer), options.out, workers, report)
    for folder in (options.out, options.out / "val"):
        if folder.exists():
            print(describe(read_shard_folder(folder)))


def load_tokenizer(name: str) -> Tokenizer:
    from oneblock.text import Tokenizer
    from oneblock.text.train import byte_level

    return byte_level() if name == "bytes" else Tokenizer.load(name)


@contextmanager
def show_progress() -> Iterator[Report]:
    """Give a function that updates a line in a terminal, and does nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing")

        def report(documents: int, tokens: int) -> None:
            elapsed = max(bar.tasks[0].elapsed or 0.0, 1e-9)
            rate = f"{tokens / elapsed / 1e6:.2f} M tokens/s"
            bar.update(task, description=f"{documents:,} documents, {tokens:,} tokens, {rate}")

        yield report


def verify_data(options: DataOptions) -> None:
    from oneblock.store.manifest import verify

    shards = read_folder(options)
    verify(shards.folder)
    print(to_json(shards) if options.json else f"{describe(shards)}: checksums match")


def show_data(options: DataOptions) -> None:
    shards = read_folder(options)
    if options.json:
        print(to_json(shards))
        return
    tokens = shards.open()
    start = shards.tokenizer.decode(tokens.read(0, min(60, len(tokens))).tolist(), skip_special=False)
    print(f"{describe(shards)}\ntokenizer {shards.fingerprint}, {shards.vocab:,} tokens, stored as {shards.dtype}")
    print(f"{start!r} ..")


def read_folder(options: DataOptions) -> ShardFolder:
    from oneblock.data.shards import read_shard_folder

    if options.folder is None:
        raise OneblockError(f"oneblock data {options.action} needs a folder of prepared data")
    return read_shard_folder(options.folder)


def describe(shards: ShardFolder) -> str:
    return f"{shards.folder}: {shards.tokens:,} tokens in {shards.documents:,} documents"


def to_json(shards: ShardFolder) -> str:
    return jsonlib.dumps({**asdict(shards), "folder": str(shards.folder)})
