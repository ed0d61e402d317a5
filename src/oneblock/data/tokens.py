"""A long token sequence in one or more parts: an array, or the memory-mapped shards of a folder."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[Any]  # uint16 or uint32


def id_dtype(vocab: int) -> str:
    """The smallest dtype for the ids of a vocabulary."""
    return "uint16" if vocab <= 2**16 else "uint32"


class Tokens:
    """Parts that are read as one sequence; memory-mapped parts stay on disk until they are read."""

    def __init__(self, parts: Sequence[Ids], ends: Ids | None = None):
        """`ends`: the offset after each document, in increasing order."""
        self.parts = [part for part in parts if len(part)]
        self.starts = [0, *np.cumsum([len(part) for part in self.parts]).tolist()]
        self.ends = ends

    def __len__(self) -> int:
        return self.starts[-1]

    def gather_rows(self, starts: Ids, length: int) -> NDArray[np.int64]:
        """The `length` ids from each start, (n, length)."""
        if len(self.parts) == 1:
            return self.parts[0][starts[:, None] + np.arange(length)].astype(np.int64)
        return np.stack([self.read(int(start), length) for start in starts])

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """The `length` ids from one start, across the borders of parts."""
        first = bisect_right(self.starts, start) - 1
        pieces, remaining = [], length
        for part, part_start in zip(self.parts[first:], self.starts[first:], strict=False):
            offset = max(start - part_start, 0)
            pieces.append(part[offset : offset + remaining])
            remaining -= len(pieces[-1])
            if not remaining:
                break
        return np.concatenate(pieces).astype(np.int64)

    def slice(self, start: int, stop: int) -> Tokens:
        """A range of the sequence; a document that is cut counts as a document on either side."""
        parts = [p[max(start - b, 0) : max(stop - b, 0)] for p, b in zip(self.parts, self.starts, strict=False)]
        if self.ends is None:
            return Tokens(parts)
        inside = self.ends[(self.ends > start) & (self.ends < stop)] - start
        return Tokens(parts, np.append(inside, stop - start))

    def document_positions(self, starts: Ids, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each token of `gather_rows`: the number of its document in the row, and its position in it."""
        assert self.ends is not None
        offsets = starts[:, None] + np.arange(length)
        document = np.searchsorted(self.ends, offsets, side="right")
        begins = np.concatenate([[0], self.ends])[document]
        # A row that starts inside a document counts positions from 0.
        return document - document[:, :1], offsets - np.maximum(begins, starts[:, None])


def concatenate_tokens(sequences: Sequence[Tokens]) -> Tokens:
    """One sequence after the other, without a copy."""
    starts = np.cumsum([0, *map(len, sequences)])
    ends = [tokens.ends + start for tokens, start in zip(sequences, starts, strict=False) if tokens.ends is not None]
    return Tokens([part for tokens in sequences for part in tokens.parts], np.concatenate(ends) if ends else None)


def as_tokens(ids: Tokens | Ids) -> Tokens:
    return ids if isinstance(ids, Tokens) else Tokens([ids])
