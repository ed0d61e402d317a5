"""Documents to token shards: in parallel, in constant memory, and going on where a killed job stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from oneblock.data.shards import TOKENIZER, dtype_for, fingerprint
from oneblock.data.sources import HUB, Document, Reading, documents
from oneblock.data.text import pieces
from oneblock.errors import OneblockError
from oneblock.files import write_file
from oneblock.store import manifest
from oneblock.text import Tokenizer

PROGRESS = "progress.json"
CHUNK = 1 << 20  # characters that a process gets at a time, about


@dataclass(frozen=True)
class Plan:
    """What decides about the shards: a job goes on only with the same."""

    sources: tuple[str, ...]
    reading: Reading = field(default_factory=Reading)
    shard_tokens: int = 100_000_000
    val_share: float = 0.0  # of the documents
    seed: int = 0
    skip_empty: bool = False
    tokenizer: str = ""  # fingerprint
    sizes: tuple[int, ...] = ()  # bytes of the files


@dataclass
class ShardWriter:
    """The training or the validation shards: what is full is on the disk, the rest is gathered here."""

    folder: Path
    shards: int = 0
    tokens: int = 0
    documents: int = 0
    ids: list[Any] = field(default_factory=list)
    waiting: int = 0  # tokens in ids

    def add(self, ids: Any) -> None:
        self.ids.append(ids)
        self.waiting += len(ids)

    def write(self) -> None:
        """What was gathered becomes the next shard."""
        name = f"shard-{self.shards:05}"
        ends = np.cumsum([len(x) for x in self.ids]).astype("<u8")
        whole = np.concatenate(self.ids)
        for suffix, array in ((".bin", whole.astype(whole.dtype.newbyteorder("<"))), (".ends", ends)):
            write_file(self.folder / f"{name}{suffix}", array.tobytes())
        self.shards, self.tokens, self.documents = self.shards + 1, self.tokens + len(whole), self.documents + len(ends)
        self.ids, self.waiting = [], 0


Report = Callable[[int, int], None]  # documents and tokens so far


def prepare(plan: Plan, tokenizer: Tokenizer, out: Path, workers: int, report: Report = lambda d, t: None) -> None:
    """Write `out`, and `out/val` where documents are held out. A finished folder has its manifest, last of all."""
    if (out / manifest.MANIFEST).exists():
        raise OneblockError(f"{out} is prepared already: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / TOKENIZER)
    plan = planned(plan, out)
    sides = [ShardWriter(out), ShardWriter(out / "val")]
    done = begin(plan, out, sides)
    seen, dtype = done, dtype_for(tokenizer.vocab_size)
    for ids in encoded(islice(wanted(plan), done, None), out / TOKENIZER, dtype, workers):
        side = sides[held_out(seen, plan)]
        side.add(ids)
        seen += 1
        if sum(side.waiting for side in sides) >= plan.shard_tokens:
            for side in (side for side in sides if side.ids):
                side.write()
            record(plan, out, sides, seen)
        report(seen, sum(side.tokens + side.waiting for side in sides))
    for side in (side for side in sides if side.ids):
        side.write()
    if not sides[0].tokens:
        raise OneblockError(f"there are no documents to learn from in {', '.join(plan.sources)}")
    finish(sides, tokenizer, dtype, out)


def planned(plan: Plan, out: Path) -> Plan:
    """The plan with what is known of its tokenizer and files."""
    sizes = []
    for source in plan.sources:
        try:
            sizes.append(-1 if source.startswith(HUB) else Path(source).stat().st_size)
        except OSError as e:
            raise OneblockError(f"cannot read {source}: {e.strerror}") from None
    return Plan(**{**vars(plan), "tokenizer": fingerprint(out), "sizes": tuple(sizes)})


def wanted(plan: Plan) -> Iterator[Document]:
    """The documents that are kept. An empty one is an error, or passed over where that was asked for."""
    for document in documents(plan.sources, plan.reading):
        if document.text.strip():
            yield document
        elif not plan.skip_empty:
            raise OneblockError(f"{document.source}: document {document.number:,} is empty: mend it, or --skip-empty")


def held_out(number: int, plan: Plan) -> bool:
    """Whether a document is for validation: it follows from the seed and its number."""
    draw = hashlib.sha256(f"{plan.seed} {number}".encode()).digest()
    return int.from_bytes(draw[:8], "big") < plan.val_share * 2**64


# ------------------------------------------------------------------ tokens


def encoded(found: Iterator[Document], tokenizer: Path, dtype: str, workers: int) -> Iterator[Any]:
    """The ids of each document, in order, made by processes that run ahead by a few chunks each."""
    if workers < 2:
        start(tokenizer, dtype)
        for chunk in chunks(found):
            yield from work(chunk)
        return
    context = get_context("spawn")  # the parent has threads
    with ProcessPoolExecutor(workers, context, initializer=start, initargs=(tokenizer, dtype)) as pool:
        ahead: list[Future[list[Any]]] = []
        for chunk in chunks(found):
            ahead.append(pool.submit(work, chunk))
            if len(ahead) > 3 * workers:
                yield from ahead.pop(0).result()
        for future in ahead:
            yield from future.result()


def chunks(found: Iterator[Document]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in found:
        chunk.append(document.text)
        size += len(document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_mine: list[Any] = []  # this process's tokenizer and dtype


def start(tokenizer: Path, dtype: str) -> None:
    _mine[:] = [Tokenizer.load(tokenizer), dtype]


def work(texts: list[str]) -> list[Any]:
    """Each text's ids with the end-of-text id behind them, where the tokenizer has one."""
    tokenizer, dtype = _mine
    end = list(tokenizer.eos_ids[:1])
    cut = [list(pieces(text)) for text in texts]
    ids = iter(tokenizer.encode_batch([piece for text in cut for piece in text], bos=False))
    return [np.array([i for _ in text for i in next(ids)] + end, dtype) for text in cut]


# ------------------------------------------------------------------ on the disk


def record(plan: Plan, out: Path, sides: list[ShardWriter], seen: int) -> None:
    """Where to go on, should the job be killed."""
    state = [[side.shards, side.tokens, side.documents] for side in sides]
    write_file(out / PROGRESS, json.dumps({"plan": asdict(plan), "done": seen, "sides": state}))


def begin(plan: Plan, out: Path, sides: list[ShardWriter]) -> int:
    """Documents that are already in shards. OneblockError where the folder belongs to another job."""
    path = out / PROGRESS
    if not path.exists():
        others = [
            p.name for p in out.iterdir() if p.name != TOKENIZER and not p.name.startswith((".", "shard-", "val"))
        ]
        if others:
            raise OneblockError(f"{out} holds other things ({others[0]}): choose an empty folder for --out")
        return 0
    found = json.loads(path.read_text())
    if found["plan"] != json.loads(json.dumps(asdict(plan))):
        raise OneblockError(f"{out} was begun with other files or settings: choose another --out, or delete it")
    for side, done in zip(sides, found["sides"], strict=True):
        side.shards, side.tokens, side.documents = done
    return found["done"]


def finish(sides: list[ShardWriter], tokenizer: Tokenizer, dtype: str, out: Path) -> None:
    """The manifests; the training one last, since it says that all is done."""
    (out / PROGRESS).unlink(missing_ok=True)
    for side in reversed([side for side in sides if side.tokens]):
        if side.folder != out:
            shutil.copytree(out / TOKENIZER, side.folder / TOKENIZER, dirs_exist_ok=True)
        names = [f"shard-{i:05}{suffix}" for i in range(side.shards) for suffix in (".bin", ".ends")]
        names += [f"{TOKENIZER}/{path.name}" for path in sorted((out / TOKENIZER).iterdir())]
        about = {"dtype": dtype, "vocab": tokenizer.vocab_size, "tokens": side.tokens, "documents": side.documents}
        sums = manifest.sums_of(side.folder, names)
        text = manifest.text_of(sums, {**about, "tokenizer": fingerprint(side.folder)})
        write_file(side.folder / manifest.MANIFEST, text)
