"""Text to ids to batches; batch n is a pure function of (seed, n)."""

from oneblock.data.rows import Batch, Rows
from oneblock.data.text import encode, pieces, read_texts

__all__ = ["Batch", "Rows", "encode", "pieces", "read_texts"]
