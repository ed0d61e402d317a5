"""A long row of ids as batches to train on. B batch, T tokens in a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oneblock.errors import OneblockError

IGNORE = -100  # a target that nothing is learned from


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T)
    targets: Tensor  # (B, T), the token after each; IGNORE where there is none
    count: int  # targets that count
    documents: Tensor | None = None  # (B, T), the document of its row that each token belongs to
    positions: Tensor | None = None  # (B, T), of each token in its document

    def to(self, device: torch.device | str) -> Batch:
        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        tensors = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{key: moved(value) for key, value in tensors.items()})


class Rows:
    """Rows of T tokens out of one long text, shuffled anew each epoch.

    An epoch cuts the text into rows that do not overlap, at an offset of its own, and deals them in an order of its
    own. `batch(n)` depends on the seed and n alone, so a run can go on from anywhere.
    """

    def __init__(self, ids: NDArray[Any], length: int, batch: int, seed: int):
        if len(ids) < length + 1:
            raise OneblockError(
                f"the training text has {len(ids):,} tokens, fewer than one row of {length:,} and its next token: "
                f"give more text or a smaller --context"
            )
        self.ids, self.length, self.size, self.seed = ids, length, batch, seed
        self.rows = max(1, (len(ids) - length) // length)  # in an epoch; one less than fit, so that cuts can move
        self._epoch = lru_cache(maxsize=2)(self._deal)

    def batch(self, n: int) -> Batch:
        """The n-th batch of the run."""
        starts = [self._start(i) for i in range(n * self.size, (n + 1) * self.size)]
        return batch_of(self.ids, np.array(starts), self.length)

    def _start(self, i: int) -> int:
        offset, order = self._epoch(i // self.rows)
        return offset + int(order[i % self.rows]) * self.length

    def _deal(self, epoch: int) -> tuple[int, NDArray[Any]]:
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        slack = len(self.ids) - 1 - self.rows * self.length
        return int(random.integers(slack + 1)), random.permutation(self.rows)


def batch_of(ids: NDArray[Any], starts: NDArray[Any], length: int) -> Batch:
    rows = torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return Batch(rows[:, :-1], rows[:, 1:], len(starts) * length)


def in_order(ids: NDArray[Any], length: int, batch: int) -> Iterator[Batch]:
    """The whole text once, from start to end; every token but the first is a target exactly once."""
    whole = (len(ids) - 1) // length
    for first in range(0, whole, batch):
        yield batch_of(ids, np.arange(first, min(first + batch, whole)) * length, length)
    if rest := len(ids) - 1 - whole * length:
        yield batch_of(ids, np.array([whole * length]), rest)
