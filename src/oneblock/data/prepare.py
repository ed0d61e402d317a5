"""Tokenize documents into shards: in parallel, in constant memory, and resumable after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from oneblock.config import SEED, Range, check_range, check_ranges
from oneblock.data.documents import HUB, DocumentFormat, chunk_texts, encode_documents, read_documents
from oneblock.data.shards import TOKENIZER, fingerprint
from oneblock.data.tokens import id_dtype
from oneblock.errors import OneblockError
from oneblock.files import write_file
from oneblock.store import manifest
from oneblock.text import Tokenizer

PROGRESS = "progress.json"
MAX_WORKERS = 1024


@dataclass(frozen=True)
class PrepareOptions:
    """Everything that determines the shards; a stopped job resumes only with the same options."""

    sources: tuple[str, ...]  # files, or data sets of the hub (hf:NAME)
    layout: DocumentFormat = field(default_factory=DocumentFormat)
    shard_tokens: Annotated[int, Range(low=1)] = 100_000_000
    val_share: Annotated[float, Range(low=0, below=1)] = 0.0  # share of the documents held out for validation
    seed: Annotated[int, SEED] = 0  # seed of the held-out documents
    skip_empty: bool = False
    tokenizer: str = ""  # fingerprint, set by `prepare_shards`
    sizes: tuple[int, ...] = ()  # bytes of the files, set by `prepare_shards`

    __post_init__ = check_ranges


@dataclass
class ShardWriter:
    """Writes the training or the validation shards; buffers the documents of the next shard."""

    folder: Path
    shards: int = 0  # written
    tokens: int = 0  # in written shards
    documents: int = 0  # in written shards
    buffer: list[Any] = field(default_factory=list)  # ids of each document
    buffered: int = 0  # tokens

    def add(self, ids: Any) -> None:
        self.buffer.append(ids)
        self.buffered += len(ids)

    def write_shard(self) -> None:
        """Write the buffered documents as the next shard, if there are any."""
        if not self.buffer:
            return
        ids, ends = np.concatenate(self.buffer), np.cumsum([len(document) for document in self.buffer])
        for suffix, array in ((".bin", ids.astype(ids.dtype.newbyteorder("<"))), (".ends", ends.astype("<u8"))):
            write_file(self.folder / f"shard-{self.shards:05}{suffix}", array.tobytes())
        self.shards, self.tokens, self.documents = self.shards + 1, self.tokens + len(ids), self.documents + len(ends)
        self.buffer, self.buffered = [], 0


Report = Callable[[int, int], None]  # documents and tokens so far


def prepare_shards(
    options: PrepareOptions, tokenizer: Tokenizer, out: Path, workers: int, report: Report = lambda d, t: None
) -> None:
    """Write `out`, and `out/val` if documents are held out. The manifest of `out` is written last."""
    check_range("workers", workers, Range(1, MAX_WORKERS), int)
    if (out / manifest.MANIFEST).exists():
        raise OneblockError(f"{out} is prepared already: choose another --out")
    sizes = tuple(map(source_size, options.sources))
    tokenizer.save(out / TOKENIZER)
    options = replace(options, tokenizer=fingerprint(out), sizes=sizes)
    train, val = writers = [ShardWriter(out), ShardWriter(out / "val")]
    done = resume(options, out, writers)
    for ids in encode_in_parallel(options, done, tokenizer, out / TOKENIZER, workers):
        (val if is_held_out(done, options) else train).add(ids)
        done += 1
        if train.buffered + val.buffered >= options.shard_tokens:
            for writer in writers:
                writer.write_shard()
            record_progress(options, out, writers, done)
        report(done, sum(writer.tokens + writer.buffered for writer in writers))
    for writer in writers:
        writer.write_shard()
    if not train.tokens:
        raise OneblockError(f"there are no documents to train on in {', '.join(options.sources)}")
    finish(writers, tokenizer, out)


def source_size(source: str) -> int:
    """The bytes of a file; -1 for a data set of the hub."""
    try:
        return -1 if source.startswith(HUB) else Path(source).stat().st_size
    except OSError as error:
        raise OneblockError(f"cannot read {source}: {error.strerror}") from None


def is_held_out(number: int, options: PrepareOptions) -> bool:
    """Whether a document is for validation, by the hash of the seed and its number."""
    digest = hashlib.sha256(f"{options.seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < options.val_share * 2**64


# ------------------------------------------------------------------ tokenization


def encode_in_parallel(
    options: PrepareOptions, skip: int, tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[Any]:
    """The ids of each document after the first `skip`, in order; worker processes run ahead by a few chunks.

    `folder`: where the workers load the tokenizer from.
    """
    documents = read_documents(options.sources, options.layout, options.skip_empty)
    chunks = chunk_texts(document.text for document in islice(documents, skip, None))
    if workers == 1:
        for chunk in chunks:
            yield from encode_documents(chunk, tokenizer)
        return
    context = get_context("spawn")  # forking a process with threads may deadlock
    with ProcessPoolExecutor(workers, context) as pool:
        pending: list[Future[list[Any]]] = []
        for chunk in chunks:
            pending.append(pool.submit(encode_chunk, folder, chunk))
            if len(pending) > 3 * workers:
                yield from pending.pop(0).result()
        for future in pending:
            yield from future.result()


def encode_chunk(folder: Path, texts: list[str]) -> list[Any]:
    """Encode in a worker process, which loads the tokenizer once."""
    return encode_documents(texts, load_tokenizer(folder))


load_tokenizer = cache(Tokenizer.load)


# ------------------------------------------------------------------ files


def record_progress(options: PrepareOptions, out: Path, writers: list[ShardWriter], documents: int) -> None:
    """Write what `resume` needs after a kill."""
    state = [[writer.shards, writer.tokens, writer.documents] for writer in writers]
    progress = {"options": asdict(options), "documents": documents, "writers": state}
    write_file(out / PROGRESS, json.dumps(progress))


def resume(options: PrepareOptions, out: Path, writers: list[ShardWriter]) -> int:
    """Restore the writers; return the number of documents in written shards. OneblockError for another job's folder."""
    path = out / PROGRESS
    if not path.exists():
        own = (".", "shard-", "val")
        foreign = [p.name for p in out.iterdir() if p.name != TOKENIZER and not p.name.startswith(own)]
        if foreign:
            raise OneblockError(f"{out} has other files ({foreign[0]}): choose an empty folder for --out")
        return 0
    progress = json.loads(path.read_text())
    if progress["options"] != json.loads(json.dumps(asdict(options))):
        raise OneblockError(f"{out} was begun with other files or options: choose another --out, or delete it")
    for writer, state in zip(writers, progress["writers"], strict=True):
        writer.shards, writer.tokens, writer.documents = state
    return progress["documents"]


def finish(writers: list[ShardWriter], tokenizer: Tokenizer, out: Path) -> None:
    """Write the manifests; that of the training shards last, since it marks the job as done."""
    (out / PROGRESS).unlink(missing_ok=True)
    for writer in reversed([writer for writer in writers if writer.tokens]):
        tokenizer.save(writer.folder / TOKENIZER)
        names = [f"shard-{i:05}{suffix}" for i in range(writer.shards) for suffix in (".bin", ".ends")]
        names += [f"{TOKENIZER}/{path.name}" for path in sorted((out / TOKENIZER).iterdir())]
        vocab = tokenizer.vocab_size
        about = {"dtype": id_dtype(vocab), "vocab": vocab, "tokens": writer.tokens, "documents": writer.documents}
        sums = manifest.hash_files(writer.folder, names)
        manifest.write(writer.folder, sums, **about, tokenizer=fingerprint(writer.folder))
