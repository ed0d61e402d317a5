"""Long rows of ids as batches to train on. B batch, T tokens in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oneblock.data.tokens import Ids, Tokens, as_tokens
from oneblock.errors import OneblockError

IGNORE = -100  # a target that nothing is learned from
BLOCK = 1024  # rows within which sources come in their shares


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T)
    targets: Tensor  # (B, T), the token after each; IGNORE where there is none
    count: int  # targets that count
    documents: Tensor | None = None  # (B, T), the document of its row that each token belongs to
    positions: Tensor | None = None  # (B, T), of each token in its document

    def to(self, device: torch.device | str) -> Batch:
        return self._with(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """For copies to a GPU that nobody waits for."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Any) -> Batch:
        tensors = {key: change(value) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class PackedDataset:
    """Rows of T tokens out of long texts, shuffled anew each epoch of each text.

    An epoch cuts a text into rows that do not overlap, at an offset of its own, and deals them in an order of its own.
    Several texts are mixed by their weights, met within every 1024 rows. `batch(n)` depends on the seed and n alone,
    so a run can go on from anywhere, with any number of ranks.
    """

    def __init__(
        self,
        texts: Tokens | Ids | Sequence[Tokens],
        length: int,
        batch: int,
        seed: int,
        weights: Sequence[float] = (),
        documents: bool = False,
    ):
        """`documents`: attention and positions stay inside each document of a row, which the texts must know.

        Without weights, texts come in the shares of their lengths.
        """
        several = isinstance(texts, Sequence) and not isinstance(texts, np.ndarray)
        found = [as_tokens(text) for text in texts] if several else [as_tokens(texts)]  # type: ignore[arg-type]
        if documents and any(text.ends is None for text in found):
            raise OneblockError("the text does not say where its documents end: prepare it with oneblock data prepare")
        self.sources = [Source(text, length, [seed, i] if i else [seed]) for i, text in enumerate(found)]
        self.shares = shares(weights or [len(text) for text in found], len(found))
        self.length, self.size, self.seed, self.documents = length, batch, seed, documents
        self._block = lru_cache(maxsize=4)(self._mixed)

    def batch(self, n: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The n-th batch of the run, or one rank's part of it."""
        if self.size % ranks:
            raise OneblockError(f"a batch of {self.size} rows does not divide by {ranks} ranks: change --batch-size")
        part = self.size // ranks
        first = n * self.size + rank * part
        places = [self.place(i) for i in range(first, first + part)]
        batches = [
            batch_of(source.text, np.array([start for k, start in places if k == i]), self.length, self.documents)
            for i, source in enumerate(self.sources)
            if any(k == i for k, _ in places)
        ]
        return batches[0] if len(batches) == 1 else joined(batches, [k for k, _ in places])

    def place(self, i: int) -> tuple[int, int]:
        """Of the i-th row of the run: its text, and the offset it starts at."""
        if len(self.sources) == 1:
            return 0, self.sources[0].start(i)
        which, number = self._block(i // BLOCK)
        k = int(which[i % BLOCK])
        return k, self.sources[k].start(int(number[i % BLOCK]))

    def _mixed(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each row of a block: its text, and its number among that text's rows."""
        before, after = (counts(self.shares, b * BLOCK) for b in (block, block + 1))
        which = np.repeat(np.arange(len(self.sources)), after - before)
        np.random.Generator(np.random.Philox(key=[self.seed, (1 << 63) + block])).shuffle(which)
        number = np.empty(BLOCK, np.int64)
        for k, first in enumerate(before):
            mine = which == k
            number[mine] = first + np.arange(mine.sum())
        return which, number


class Source:
    """One text's rows, epoch after epoch."""

    def __init__(self, text: Tokens, length: int, key: list[int]):
        if len(text) < length + 1:
            raise OneblockError(
                f"the training text has {len(text):,} tokens, fewer than one row of {length:,} and its next token: "
                f"give more text or a smaller --context"
            )
        self.text, self.length, self.key = text, length, key
        self.rows = max(1, (len(text) - length) // length)  # in an epoch; one less than fit, so that cuts can move
        self._epoch = lru_cache(maxsize=2)(self._deal)

    def start(self, i: int) -> int:
        offset, order = self._epoch(i // self.rows)
        return offset + int(order[i % self.rows]) * self.length

    def _deal(self, epoch: int) -> tuple[int, NDArray[Any]]:
        seed, text = self.key[0], self.key[1] if len(self.key) > 1 else 0
        random = np.random.Generator(np.random.Philox(key=[seed, (text << 32) + epoch]))
        slack = len(self.text) - 1 - self.rows * self.length
        return int(random.integers(slack + 1)), random.permutation(self.rows)


def shares(weights: Sequence[float], texts: int) -> NDArray[np.float64]:
    found = np.array(weights, np.float64)
    if len(found) != texts:
        raise OneblockError(f"there are {len(found)} weights for {texts} texts: give one for each")
    if not np.isfinite(found).all() or (found < 0).any() or not found.sum():
        raise OneblockError(f"the weights {', '.join(map(str, weights))} are no shares: give numbers above 0")
    return found / found.sum()


def counts(shares: NDArray[np.float64], rows: int) -> NDArray[np.int64]:
    """How many of the first `rows` rows each text has: never more than one off its share, and in all exactly `rows`."""
    return np.diff(np.round(np.cumsum(shares) * rows).astype(np.int64), prepend=0)


def batch_of(text: Tokens, starts: Ids, length: int, documents: bool = False) -> Batch:
    rows = torch.from_numpy(text.take(starts, length + 1))
    if not documents:
        return Batch(rows[:, :-1], rows[:, 1:], len(starts) * length)
    document, position = (torch.from_numpy(x) for x in text.documents(starts, length + 1))
    inside = document[:, 1:] == document[:, :-1]
    targets = torch.where(inside, rows[:, 1:], IGNORE)  # nobody learns how the next document begins
    return Batch(rows[:, :-1], targets, int(inside.sum()), document[:, :-1], position[:, :-1])


def joined(batches: list[Batch], order: list[int]) -> Batch:
    """Rows of several texts, each text's in a row, back in the order of the run."""
    ranks = np.argsort(np.argsort(order, kind="stable"), kind="stable")

    def put(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)[torch.from_numpy(ranks)]

    ids, targets = put("ids"), put("targets")
    assert ids is not None
    assert targets is not None
    return Batch(ids, targets, sum(batch.count for batch in batches), put("documents"), put("positions"))


def in_order(ids: Tokens | Ids, length: int, batch: int, documents: bool = False) -> Iterator[Batch]:
    """The whole text once, from start to end; every token but the first is a target exactly once."""
    text = as_tokens(ids)
    whole = (len(text) - 1) // length
    for first in range(0, whole, batch):
        yield batch_of(text, np.arange(first, min(first + batch, whole)) * length, length, documents)
    if rest := len(text) - 1 - whole * length:
        yield batch_of(text, np.array([whole * length]), rest, documents)
