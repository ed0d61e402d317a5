"""Batches that worker processes build in advance, in the same order as without workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from oneblock.data.packed import Batch, PackedDataset
from oneblock.errors import OneblockError

TIMEOUT = 60.0  # seconds that a worker may take for a batch
PREFETCH = 4  # batches that each worker builds in advance

Arrays = dict[str, Any]  # a batch's fields as NumPy arrays: tensors would need a living worker to be received


class BatchLoader:
    """Returns one rank's part of batch n; with workers, the batches after n are built in advance."""

    def __init__(self, dataset: PackedDataset, rank: int = 0, ranks: int = 1, workers: int = 0, pin: bool = False):
        """`pin`: batches in page-locked memory."""
        dataset.batch(0, rank, ranks)  # raises now if the batch size is not divisible
        self.dataset, self.rank, self.ranks, self.workers, self.pin = dataset, rank, ranks, workers, pin
        self.next = 0
        self.stream: Iterator[Arrays] = iter(())

    def __call__(self, n: int) -> Batch:
        batch = self._receive(n) if self.workers else self.dataset.batch(n, self.rank, self.ranks)
        return batch.pin_memory() if self.pin else batch

    def _receive(self, n: int) -> Batch:
        """The batch from a worker. Any other n than the last one plus 1 restarts the workers."""
        if n != self.next or not self._is_open:
            self.close()
            self.next, self.stream = n, self._start_workers(n)
        self.next = n + 1
        try:
            arrays = next(self.stream)
        except RuntimeError as error:
            self._kill_workers()
            reason = str(error).splitlines()[0]
            raise OneblockError(f"a data worker died or hangs ({reason}); --workers 0 uses none") from None
        fields: Any = {k: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for k, x in arrays.items()}
        return Batch(**fields)

    @property
    def _is_open(self) -> bool:
        return hasattr(self.stream, "_shutdown_workers")

    def _start_workers(self, n: int) -> Iterator[Arrays]:
        loader: DataLoader[Any] = DataLoader(
            NumberedBatches(self.dataset, self.rank, self.ranks),
            batch_size=None,
            sampler=itertools.count(n),
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            collate_fn=dict,  # the default would build tensors
            timeout=TIMEOUT,
            worker_init_fn=_use_one_thread,
        )
        return iter(loader)

    def close(self) -> None:
        """End the workers now; otherwise the garbage collector would."""
        if self._is_open:
            self.stream._shutdown_workers()  # type: ignore[attr-defined]
        self.stream = iter(())

    def _kill_workers(self) -> None:
        """End workers that may not answer. torch raises an error for each one that it sees die, at any time."""
        for worker in self.stream._workers:  # type: ignore[attr-defined]
            with suppress(RuntimeError):
                worker.kill()
        with suppress(RuntimeError):
            self.close()
        self.stream = iter(())

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class NumberedBatches(Dataset[Arrays]):
    """The dataset that runs in the workers: batches by their number."""

    def __init__(self, dataset: PackedDataset, rank: int, ranks: int):
        self.dataset, self.rank, self.ranks = dataset, rank, ranks

    def __getitem__(self, n: int) -> Arrays:
        batch = self.dataset.batch(n, self.rank, self.ranks)
        return {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in vars(batch).items()}


def _use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)
