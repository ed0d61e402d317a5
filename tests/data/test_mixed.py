"""Batches from several parts, several sources, and packed documents."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oneblock.data.packed import (
    IGNORE_INDEX,
    MIX_BLOCK,
    Batch,
    PackedDataset,
    normalize_weights,
    rows_per_source,
    sequential_batches,
)
from oneblock.data.tokens import Tokens
from oneblock.errors import OneblockError
from oneblock.model import Decoder, init_weights
from oneblock.spec import get_spec
from oneblock.train.task import next_token_loss

TEXT = np.arange(1000, dtype=np.uint16)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 50), st.data())
def test_parts_read_as_one(sizes: list[int], length: int, data: st.DataObject) -> None:
    whole = np.arange(sum(sizes) + 60, dtype=np.uint16)
    parts = np.split(whole, np.cumsum(sizes))
    tokens = Tokens(parts)
    assert len(tokens) == len(whole)
    starts = np.array(data.draw(st.lists(st.integers(0, len(whole) - length), min_size=1, max_size=4)))
    assert tokens.gather_rows(starts, length).tolist() == [list(range(s, s + length)) for s in starts]


def test_shards_give_the_batches_of_one_array() -> None:
    parts = PackedDataset(Tokens(np.split(TEXT, [300, 301, 700])), 16, 4, seed=1)
    for n in range(20):
        assert torch.equal(parts.batch(n).ids, PackedDataset(TEXT, 16, 4, seed=1).batch(n).ids)


# ------------------------------------------------------------------ ranks and weights


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_batch(ranks: int) -> None:
    rows = PackedDataset([Tokens([TEXT]), Tokens([TEXT + 1000])], 16, 8, seed=0)
    for n in range(10):
        parts = [rows.batch(n, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([p.ids for p in parts]), rows.batch(n).ids)
        assert sum(p.count for p in parts) == rows.batch(n).count


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(OneblockError, match="batch size 6 is not divisible by 4 data-parallel ranks"):
        PackedDataset(TEXT, 16, 6, seed=0).batch(0, 1, 4)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 10**7))
def test_shares_are_met_at_every_point(weights: list[float], rows: int) -> None:
    shares = normalize_weights(weights, len(weights))
    taken = rows_per_source(shares, rows)
    assert taken.sum() == rows
    assert np.abs(taken - shares * rows).max() <= 1.0
    assert (rows_per_source(shares, rows + MIX_BLOCK) >= taken).all()


def test_a_mixture_is_pure_and_repeats_nothing_within_a_texts_epoch() -> None:
    texts = [Tokens([TEXT]), Tokens([TEXT[:500] + 1000]), Tokens([TEXT[:100] + 2000])]
    rows = PackedDataset(texts, 4, 8, seed=5, weights=[0.7, 0.2, 0.1])
    seen = [rows.batch(n).ids for n in range(300)]
    again = PackedDataset(texts, 4, 8, seed=5, weights=[0.7, 0.2, 0.1])
    for n in (299, 0, 150, 131, 132):
        assert torch.equal(again.batch(n).ids, seen[n])
    first = torch.cat(seen)[:, 0].numpy()
    which = np.searchsorted([1000, 2000], first, side="right")
    assert np.abs(np.bincount(which) / len(first) - [0.7, 0.2, 0.1]).max() < 0.01
    for k, source in enumerate(rows.sources):
        epoch = first[which == k][: source.rows]
        assert max(Counter(epoch.tolist()).values()) == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 data sources"),
        ([1.0, -1.0], "weights is -1.0, but it must be at least 0"),
        ([0.0, 0.0], "all 0"),
        ([1, float("nan")], "weights is nan"),
    ],
)
def test_invalid_weights(weights: list[float], message: str) -> None:
    with pytest.raises(OneblockError, match=message):
        PackedDataset([Tokens([TEXT]), Tokens([TEXT])], 16, 2, seed=0, weights=weights)


# ------------------------------------------------------------------ documents

ENDS = np.array([3, 10, 11, 30, 64])


def documents() -> Tokens:
    ids = np.random.default_rng(0).integers(0, 50, 64).astype(np.uint16)
    return Tokens([ids[:20], ids[20:]], ENDS)


def test_documents_by_hand() -> None:
    text = documents()
    batch = next(sequential_batches(text, 12, 1, documents=True))
    ids = text.read(0, 13).tolist()
    assert batch.ids.tolist() == [ids[:12]]
    assert batch.documents is not None
    assert batch.positions is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, 0]]
    expected = list(ids[1:])
    for end in (3, 10, 11):
        expected[end - 1] = IGNORE_INDEX
    assert batch.targets.tolist() == [expected]
    assert batch.count == 12 - 3


def test_positions_of_a_row_that_starts_inside_a_document() -> None:
    document, position = documents().document_positions(np.array([5, 31]), 8)
    assert document.tolist() == [[0, 0, 0, 0, 0, 1, 2, 2], [0] * 8]
    assert position.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1], list(range(8))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_packed_documents_equal_separate_documents(family: str) -> None:
    """Logits and loss of a packed row equal those of its documents one at a time."""
    model = Decoder(get_spec(family, vocab=50, dim=16, n_layers=2, n_heads=2, context=64))
    init_weights(model, 0)
    text = documents()
    packed = next(sequential_batches(text, 63, 1, documents=True))
    with torch.no_grad():
        logits = model(packed.ids, positions=packed.positions, documents=packed.documents)
        loss, total = next_token_loss(model, packed), 0.0
        for start, end in zip([0, *ENDS[:-1]], ENDS, strict=True):
            ids = torch.from_numpy(text.gather_rows(np.array([start]), int(end - start)))
            here = slice(int(start), min(int(end), 63))
            torch.testing.assert_close(logits[:, here], model(ids)[:, : here.stop - here.start], atol=1e-5, rtol=1e-5)
            if end - start > 1:
                alone = Batch(ids[:, :-1], ids[:, 1:], int(end - start) - 1)
                total += float(next_token_loss(model, alone)) * alone.count
    assert float(loss) == pytest.approx(total / packed.count, abs=1e-5)


def test_a_slice_keeps_its_documents() -> None:
    text = documents().slice(5, 40)
    assert len(text) == 35
    assert text.ends is not None
    assert text.ends.tolist() == [5, 6, 25, 35]
    assert text.read(0, 35).tolist() == documents().read(5, 35).tolist()


def test_text_without_documents() -> None:
    with pytest.raises(OneblockError, match="no document boundaries"):
        PackedDataset(TEXT, 16, 2, seed=0, documents=True)
