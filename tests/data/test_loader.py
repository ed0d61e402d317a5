"""Worker processes give the same batches as none, for any number of ranks and workers."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from oneblock.data import loader as loaders
from oneblock.data.loader import BatchLoader
from oneblock.data.packed import PackedDataset
from oneblock.errors import OneblockError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning"),
]


def order(samples: int, epochs: int, ranks: int, workers: int) -> list[int]:
    """The first ids of all rows, in the global order that the ranks' batches make."""
    text = np.arange(samples // epochs * 2 + 2, dtype=np.uint32)
    rows = PackedDataset(text, 2, 40, seed=7)
    assert rows.sources[0].rows == samples // epochs
    found: list[list[int]] = [[] for _ in range(samples // 40)]
    for rank in range(ranks):
        with BatchLoader(rows, rank, ranks, workers) as load:
            for n in range(samples // 40):
                found[n] += load(n).ids[:, 0].tolist()
    return [i for batch in found for i in batch]


def check(samples: int, epochs: int) -> None:
    alone = order(samples, epochs, 1, 0)
    each = samples // epochs
    for e in range(epochs):
        assert len(set(alone[e * each : (e + 1) * each])) == each
    for ranks in (1, 2, 4):
        for workers in (0, 1, 4):
            assert order(samples, epochs, ranks, workers) == alone, (ranks, workers)


def test_the_order_is_the_same_with_any_ranks_and_workers() -> None:
    check(100_080, 3)


def test_it_resumes_from_any_batch() -> None:
    rows = PackedDataset(np.arange(1000, dtype=np.uint16), 8, 4, seed=0)
    with BatchLoader(rows, workers=1) as load:
        for n in (5, 6, 7, 3, 4, 100, 101):
            assert torch.equal(load(n).ids, rows.batch(n).ids)


def test_a_worker_that_dies_ends_in_one_line() -> None:
    rows = PackedDataset(np.arange(1000, dtype=np.uint16), 8, 4, seed=0)
    with BatchLoader(rows, workers=1) as load:
        load(0)
        os.kill(load.stream._workers[0].pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(OneblockError, match="data worker died"):
            for n in range(1, 100):
                load(n)
        assert time.monotonic() - began < 60
        assert torch.equal(load(50).ids, rows.batch(50).ids)  # and can begin again


def test_a_worker_that_hangs_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "TIMEOUT", 1.0)
    rows = PackedDataset(np.arange(1000, dtype=np.uint16), 8, 4, seed=0)
    with BatchLoader(rows, workers=1) as load:
        load(0)
        os.kill(load.stream._workers[0].pid, signal.SIGSTOP)
        with pytest.raises(OneblockError, match="died or hangs"):
            for n in range(1, 100):
                load(n)


def test_an_indivisible_batch_size_is_refused_at_once() -> None:
    rows = PackedDataset(np.arange(1000, dtype=np.uint16), 8, 6, seed=0)
    with pytest.raises(OneblockError, match="batch size 6 is not divisible by 4"):
        BatchLoader(rows, 0, 4)
