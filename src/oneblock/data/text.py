"""Files to text, and text to one long row of ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oneblock.errors import OneblockError
from oneblock.text import Tokenizer

PIECE = 100_000  # characters encoded at a time
SEAM = re.compile(r"(?<=\S\n)(?=\S)")  # where a text can be cut without changing what a tokenizer makes of it


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The text of each file. OneblockError where one is missing, empty or no UTF-8 text."""
    if not paths:
        raise OneblockError("no training text: give files with --data FILE ...")
    return [read_text(Path(path)) for path in paths]


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise OneblockError(f"cannot read {path}: {e.strerror}") from None
    if b"\0" in data:
        raise OneblockError(f"{path} is not text (it holds zero bytes): give plain text files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise OneblockError(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8 first") from None
    if not text.strip():
        raise OneblockError(f"{path} is empty: there is nothing to learn from")
    return text


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """The text in parts of about `size` characters, cut at line starts."""
    start = 0
    while len(text) - start > size:
        seam = SEAM.search(text, start + size)
        end = seam.start() if seam else len(text)
        yield text[start:end]
        start = end
    yield text[start:]


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[Any]:
    """All texts as one row of ids, each followed by the end-of-text id where the tokenizer has one."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = list(tokenizer.eos_ids[:1])
    parts: list[NDArray[Any]] = []
    for text in texts:
        todo = pieces(text)
        while batch := list(islice(todo, 16)):
            parts += [np.array(ids, dtype) for ids in tokenizer.encode_batch(batch, bos=False)]
        parts.append(np.array(end, dtype))
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
