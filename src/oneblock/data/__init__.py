"""Text to ids to batches; batch n is a pure function of (seed, n)."""

from oneblock.data.rows import Batch, Rows
from oneblock.data.text import encode, pieces, read_texts
from oneblock.data.tokens import Tokens

__all__ = ["Batch", "Rows", "Tokens", "encode", "pieces", "read_texts"]
