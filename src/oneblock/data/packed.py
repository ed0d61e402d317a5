"""Packed token sequences as training batches. B: batch, T: sequence length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oneblock.config import SEED, Range, check_range
from oneblock.data.tokens import Ids, Tokens, as_tokens
from oneblock.errors import OneblockError

IGNORE_INDEX = -100  # target of positions without a loss, as in torch.nn.functional.cross_entropy
MIX_BLOCK = 1024  # rows in which the sources have their exact shares


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one optimizer step, or of one rank's or micro-batch's part of it."""

    ids: Tensor  # (B, T)
    targets: Tensor  # (B, T), the next token of each; IGNORE_INDEX: no loss
    count: int  # targets with a loss
    documents: Tensor | None = None  # (B, T), the number of each token's document in its row
    positions: Tensor | None = None  # (B, T), the position of each token in its document

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which copies to a GPU are asynchronous."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: Any = {key: function(value) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class PackedDataset:
    """Rows of T tokens from one or more token sequences, shuffled in each epoch.

    An epoch cuts a sequence into rows that do not overlap, at a random offset and in a random order. Several sequences
    are mixed by weights, exactly within every 1024 rows. `batch(n)` depends only on the seed and n, so a run can
    resume from any step and on any number of ranks.
    """

    def __init__(
        self,
        sources: Tokens | Ids | Sequence[Tokens],
        length: int,
        batch_size: int,
        seed: int,
        weights: Sequence[float] = (),
        documents: bool = False,
    ):
        """`weights`: sampling weights of the sources; default: their lengths. `documents`: mask across documents."""
        check_range("length", length, Range(1), int)
        check_range("batch_size", batch_size, Range(1), int)
        check_range("seed", seed, SEED, int)
        check_range("weights", weights, Range(0), tuple[float, ...])
        several = isinstance(sources, Sequence) and not isinstance(sources, np.ndarray)
        sequences = [as_tokens(source) for source in sources] if several else [as_tokens(sources)]  # type: ignore[arg-type]
        if documents and any(tokens.ends is None for tokens in sequences):
            raise OneblockError("the tokens have no document boundaries: write them with oneblock data prepare")
        self.sources = [EpochSampler(tokens, length, seed, i) for i, tokens in enumerate(sequences)]
        self.shares = normalize_weights(weights or [len(tokens) for tokens in sequences], len(sequences))
        self.length, self.batch_size, self.seed, self.documents = length, batch_size, seed, documents
        self._mixed_block = lru_cache(maxsize=4)(self._mix_block)

    def batch(self, n: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The n-th batch of the run, or one rank's part of it."""
        if self.batch_size % ranks:
            raise OneblockError(
                f"batch size {self.batch_size} is not divisible by {ranks} data-parallel ranks: change --batch-size"
            )
        size = self.batch_size // ranks
        first = n * self.batch_size + rank * size
        rows = [self.locate_row(i) for i in range(first, first + size)]
        batches = [
            build_batch(source.tokens, np.array([start for k, start in rows if k == i]), self.length, self.documents)
            for i, source in enumerate(self.sources)
            if any(k == i for k, _ in rows)
        ]
        return batches[0] if len(batches) == 1 else merge_batches(batches, [k for k, _ in rows])

    def locate_row(self, i: int) -> tuple[int, int]:
        """The source of the run's i-th row, and the row's offset in it."""
        if len(self.sources) == 1:
            return 0, self.sources[0].row_start(i)
        source_of, number_of = self._mixed_block(i // MIX_BLOCK)
        k = int(source_of[i % MIX_BLOCK])
        return k, self.sources[k].row_start(int(number_of[i % MIX_BLOCK]))

    def _mix_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each row of a block: its source, and its number among that source's rows."""
        before, after = (rows_per_source(self.shares, b * MIX_BLOCK) for b in (block, block + 1))
        source_of = np.repeat(np.arange(len(self.sources)), after - before)
        np.random.Generator(np.random.Philox(key=[self.seed, (1 << 63) + block])).shuffle(source_of)
        number_of = np.empty(MIX_BLOCK, np.int64)
        for k, first in enumerate(before):
            own = source_of == k
            number_of[own] = first + np.arange(own.sum())
        return source_of, number_of


class EpochSampler:
    """The rows of one token sequence, epoch after epoch."""

    def __init__(self, tokens: Tokens, length: int, seed: int, index: int):
        """`index`: of the sequence among the sources, so that each is shuffled differently."""
        if len(tokens) < length + 1:
            raise OneblockError(
                f"the training text has {len(tokens):,} tokens, fewer than one sequence of {length:,} and its next "
                f"token: give more text or a smaller --context"
            )
        self.tokens, self.length, self.seed, self.index = tokens, length, seed, index
        self.rows = max(1, (len(tokens) - length) // length)  # per epoch; one less than fit, so that the offset varies
        self._epoch = lru_cache(maxsize=2)(self._shuffle_epoch)

    def row_start(self, i: int) -> int:
        offset, order = self._epoch(i // self.rows)
        return offset + int(order[i % self.rows]) * self.length

    def _shuffle_epoch(self, epoch: int) -> tuple[int, NDArray[Any]]:
        """The offset of the first row, and the order of the rows."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, (self.index << 32) + epoch]))
        slack = len(self.tokens) - 1 - self.rows * self.length
        return int(random.integers(slack + 1)), random.permutation(self.rows)


def normalize_weights(weights: Sequence[float], sources: int) -> NDArray[np.float64]:
    shares = np.array(weights, np.float64)
    if len(shares) != sources:
        raise OneblockError(f"{len(shares)} weights for {sources} data sources: give one for each")
    if not shares.sum():
        raise OneblockError("the weights are all 0: give at least one above 0")
    return shares / shares.sum()


def rows_per_source(shares: NDArray[np.float64], rows: int) -> NDArray[np.int64]:
    """How many of the first `rows` rows each source has: within one of its share, and `rows` in total."""
    return np.diff(np.round(np.cumsum(shares) * rows).astype(np.int64), prepend=0)


def build_batch(tokens: Tokens, starts: Ids, length: int, documents: bool = False) -> Batch:
    """The rows from each start as a batch; `documents`: with document numbers and positions."""
    rows = torch.from_numpy(tokens.gather_rows(starts, length + 1))
    if not documents:
        return Batch(rows[:, :-1], rows[:, 1:], len(starts) * length)
    document, position = (torch.from_numpy(x) for x in tokens.document_positions(starts, length + 1))
    inside = document[:, 1:] == document[:, :-1]
    targets = torch.where(inside, rows[:, 1:], IGNORE_INDEX)  # the first token of the next document has no loss
    return Batch(rows[:, :-1], targets, int(inside.sum()), document[:, :-1], position[:, :-1])


def merge_batches(batches: list[Batch], order: list[int]) -> Batch:
    """One batch from one per source; `order`: the source of each row."""
    ranks = torch.from_numpy(np.argsort(np.argsort(order, kind="stable"), kind="stable"))

    def merge(name: str) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)[ranks]

    ids, targets, documents, positions = map(merge, ("ids", "targets", "documents", "positions"))
    return Batch(ids, targets, sum(batch.count for batch in batches), documents, positions)


def sequential_batches(ids: Tokens | Ids, length: int, batch_size: int, documents: bool = False) -> Iterator[Batch]:
    """The whole sequence once, from start to end; every token but the first is a target exactly once."""
    tokens = as_tokens(ids)
    rows = (len(tokens) - 1) // length
    for first in range(0, rows, batch_size):
        yield build_batch(tokens, np.arange(first, min(first + batch_size, rows)) * length, length, documents)
    if remainder := len(tokens) - 1 - rows * length:
        yield build_batch(tokens, np.array([rows * length]), remainder, documents)
