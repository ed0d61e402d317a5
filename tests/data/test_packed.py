from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oneblock.data.packed import PackedDataset, sequential_batches
from oneblock.errors import OneblockError

TEXT = np.arange(1000, dtype=np.uint16)  # each id is its own position


def starts(rows: PackedDataset, batches: range) -> list[int]:
    return [int(i) for n in batches for i in rows.batch(n).ids[:, 0]]


def test_targets_are_the_next_tokens() -> None:
    batch = PackedDataset(TEXT, 16, 4, seed=3).batch(7)
    assert batch.ids.shape == (4, 16)
    assert batch.count == 64
    assert torch.equal(batch.targets, batch.ids + 1)


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    forwards, other = PackedDataset(TEXT, 16, 4, seed=3), PackedDataset(TEXT, 16, 4, seed=4)
    seen = [forwards.batch(n).ids for n in range(60)]
    backwards = PackedDataset(TEXT, 16, 4, seed=3)
    for n in reversed(range(60)):
        assert torch.equal(backwards.batch(n).ids, seen[n])
    assert not torch.equal(other.batch(0).ids, seen[0])


@given(st.integers(20, 400), st.integers(1, 19), st.integers(0, 5))
def test_an_epoch_repeats_nothing_and_misses_less_than_two_rows(size: int, length: int, epoch: int) -> None:
    rows = PackedDataset(TEXT[:size], length, 1, seed=1)
    first = epoch * rows.sources[0].rows
    seen = Counter(
        i for n in range(first, first + rows.sources[0].rows) for i in rows.batch(n).targets.flatten().tolist()
    )
    assert max(seen.values()) == 1
    assert max(seen) < size
    assert size - 1 - len(seen) < 2 * length


def test_epochs_differ_in_order_and_cut() -> None:
    rows = PackedDataset(TEXT, 16, 1, seed=1)
    first, second = (starts(rows, range(e * rows.sources[0].rows, (e + 1) * rows.sources[0].rows)) for e in (0, 1))
    assert first != second
    assert len({s % 16 for s in first}) == 1
    assert {s % 16 for s in first} != {s % 16 for s in second}


def test_validation_sees_every_token_once() -> None:
    batches = list(sequential_batches(TEXT[:103], 10, 4))
    targets = torch.cat([b.targets.flatten() for b in batches]).tolist()
    assert targets == list(range(1, 103))
    assert sum(b.count for b in batches) == 102


def test_text_shorter_than_a_row() -> None:
    assert PackedDataset(TEXT[:17], 16, 2, seed=0).batch(3).ids.tolist() == [list(range(16))] * 2
    with pytest.raises(OneblockError, match="smaller --context"):
        PackedDataset(TEXT[:16], 16, 2, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length is 0, but it must be an integer, at least 1"),
        ({"batch_size": -1}, "batch_size is -1, but it must be an integer, at least 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808, but it must be an integer, at least 0 and at most"),
        ({"weights": [float("inf")]}, "weights is inf, but it must be at least 0"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"length": 16, "batch_size": 2, "seed": 0} | changes
    with pytest.raises(OneblockError, match=message):
        PackedDataset(TEXT, **options)
