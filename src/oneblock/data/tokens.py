"""One long row of ids, in one piece or in many: an array, or the shards of a folder."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[Any]  # uint16 or uint32


class Tokens:
    """Parts that are read as one row; memory-mapped parts stay on the disk until they are read."""

    def __init__(self, parts: Sequence[Ids], ends: Ids | None = None):
        """`ends`: where each document ends, as offsets into the whole row, rising."""
        self.parts = [part for part in parts if len(part)]
        self.starts = [0, *np.cumsum([len(part) for part in self.parts]).tolist()]
        self.ends = ends

    def __len__(self) -> int:
        return self.starts[-1]

    def take(self, starts: Ids, length: int) -> NDArray[np.int64]:
        """Rows of `length` ids from each start: (n, length)."""
        if len(self.parts) == 1:
            return self.parts[0][starts[:, None] + np.arange(length)].astype(np.int64)
        return np.stack([self.run(int(start), length) for start in starts])

    def run(self, start: int, length: int) -> NDArray[np.int64]:
        """One row, across the borders of parts."""
        first = bisect_right(self.starts, start) - 1
        pieces, left = [], length
        for part, begin in zip(self.parts[first:], self.starts[first:], strict=False):
            at = max(start - begin, 0)
            pieces.append(part[at : at + left])
            left -= len(pieces[-1])
            if not left:
                break
        return np.concatenate(pieces).astype(np.int64)

    def slice(self, start: int, stop: int) -> Tokens:
        """A stretch as a row of its own; a document that is cut counts as one on either side."""
        parts = [p[max(start - b, 0) : max(stop - b, 0)] for p, b in zip(self.parts, self.starts, strict=False)]
        if self.ends is None:
            return Tokens(parts)
        inside = self.ends[(self.ends > start) & (self.ends < stop)] - start
        return Tokens(parts, np.append(inside, stop - start))

    def documents(self, starts: Ids, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of rows as `take` gives them: each token's document, counted from its row's first, and place in it."""
        assert self.ends is not None
        places = starts[:, None] + np.arange(length)
        document = np.searchsorted(self.ends, places, side="right")
        begins = np.concatenate([[0], self.ends])[document]
        first = document - document[:, :1]
        return first, places - np.maximum(begins, starts[:, None])  # a row that starts inside a document counts from 0


def joined(texts: Sequence[Tokens]) -> Tokens:
    """One after the other."""
    starts = np.cumsum([0, *map(len, texts)])
    ends = [text.ends + start for text, start in zip(texts, starts, strict=False) if text.ends is not None]
    return Tokens([part for text in texts for part in text.parts], np.concatenate(ends) if ends else None)


def as_tokens(ids: Tokens | Ids) -> Tokens:
    return ids if isinstance(ids, Tokens) else Tokens([ids])
