"""This process's place among those that train together: alone, unless a mesh says otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oneblock.data.rows import Batch


@dataclass
class World:
    rank: int = 0
    size: int = 1
    data_rank: int = 0  # which share of a batch's rows this process reads
    data_ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints what concerns all."""
        return self.rank == 0

    @property
    def averaged(self) -> int:
        """Over how many ranks the backward pass averages gradients."""
        return 1

    def split(self, batch: Batch) -> Batch:
        """This process's part of the rows it reads."""
        return batch

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks that read different tokens."""
        return x

    def agree(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def syncing(self, learner: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around one batch's backward pass: gradients are exchanged with the last of a step."""
        return nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients so that their norm is at most `limit`; the norm they had."""
        return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
