"""Batches made in the background: worker processes run ahead of the loop, and the order stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from oneblock.data.packed import Batch, PackedDataset
from oneblock.errors import OneblockError

PATIENCE = 60.0  # seconds that a worker may take for a batch
AHEAD = 4  # batches that each worker makes in advance


class Loader:
    """Batch n of one rank, as `rows.batch(n, rank, ranks)` gives it; with workers, those after n are on their way."""

    def __init__(self, rows: PackedDataset, rank: int = 0, ranks: int = 1, workers: int = 0, pin: bool = False):
        rows.batch(0, rank, ranks)  # what cannot be divided is told now
        self.rows, self.rank, self.ranks, self.workers, self.pin = rows, rank, ranks, workers, pin
        self.next = 0
        self.stream: Iterator[Arrays] = iter(())

    def __call__(self, n: int) -> Batch:
        if not self.workers:
            batch = self.rows.batch(n, self.rank, self.ranks)
            return batch.pin_memory() if self.pin else batch
        if n != self.next or not self._open:
            self.close()
            self.next, self.stream = n, self._from(n)
        self.next = n + 1
        try:
            batch = with_tensors(next(self.stream))
            return batch.pin_memory() if self.pin else batch
        except RuntimeError as e:
            self.kill()
            raise OneblockError(
                f"a loader worker died or hangs ({str(e).splitlines()[0]}): --workers 0 needs none"
            ) from None

    @property
    def _open(self) -> bool:
        return hasattr(self.stream, "_shutdown_workers")

    def _from(self, n: int) -> Iterator[Arrays]:
        loader: DataLoader[Any] = DataLoader(
            Numbered(self.rows, self.rank, self.ranks),
            batch_size=None,
            sampler=From(n),
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            collate_fn=as_made,  # type: ignore[arg-type]
            timeout=PATIENCE,
            worker_init_fn=alone,
        )
        return iter(loader)

    def close(self) -> None:
        if self._open:
            self.stream._shutdown_workers()  # type: ignore[attr-defined] # else only the collector would
        self.stream = iter(())

    def kill(self) -> None:
        """End workers that may not answer; torch raises an error for each at whatever moment it sees it die."""
        for worker in self.stream._workers:  # type: ignore[attr-defined]
            with suppress(RuntimeError):
                worker.kill()
        with suppress(RuntimeError):
            self.close()
        self.stream = iter(())

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


Arrays = dict[str, Any]  # a batch's fields as arrays: tensors would need their worker alive to be received


def with_tensors(arrays: Arrays) -> Batch:
    fields: Any = {k: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for k, x in arrays.items()}
    return Batch(**fields)


def as_made(arrays: Arrays) -> Arrays:
    return arrays


class Numbered(Dataset[Arrays]):
    """Batches by their number."""

    def __init__(self, rows: PackedDataset, rank: int, ranks: int):
        self.rows, self.rank, self.ranks = rows, rank, ranks

    def __getitem__(self, n: int) -> Arrays:
        batch = self.rows.batch(n, self.rank, self.ranks)
        return {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in vars(batch).items()}


class From(Sampler[int]):
    """n, n + 1, .. without an end."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self) -> Iterator[int]:
        n = self.n
        while True:
            yield n
            n += 1


def alone(worker: int) -> None:
    torch.set_num_threads(1)
