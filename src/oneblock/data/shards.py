"""A folder of prepared tokens: shards of ids, where their documents end, the tokenizer, and a manifest of it all.

manifest.json          tokens, documents, dtype, vocabulary, the tokenizer's fingerprint; sizes and sha256 of all files
shard-00000.bin        ids, little-endian, 2 or 4 bytes each
shard-00000.ends       where each document of the shard ends, 8 bytes each
tokenizer/             what made the ids
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oneblock.data.tokens import Tokens
from oneblock.errors import OneblockError
from oneblock.store import manifest
from oneblock.text import Tokenizer

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Shards:
    """What a folder's manifest says."""

    folder: Path
    dtype: str  # uint16 or uint32
    vocab: int
    tokens: int
    documents: int
    fingerprint: str  # of the tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / TOKENIZER)

    def open(self) -> Tokens:
        """The ids, which stay on the disk until they are read. Sizes are checked, sums are not (`verify`)."""
        files = manifest.read(self.folder)["files"]
        parts, ends, before = [], [], 0
        for name in sorted(name for name in files if name.endswith(".bin")):
            ids = self._map(name, files, np.dtype(self.dtype).newbyteorder("<"))
            inside = self._map(Path(name).with_suffix(".ends").name, files, np.dtype("<u8"))
            parts.append(ids)
            ends.append(np.asarray(inside, np.int64) + before)
            before += len(ids)
        return Tokens(parts, np.concatenate(ends) if ends else np.zeros(0, np.int64))

    def _map(self, name: str, files: dict[str, Any], dtype: np.dtype[Any]) -> Any:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else -1
        if name not in files or size != files[name]["bytes"]:
            raise OneblockError(f"{path} is missing or cut short ({max(size, 0):,} bytes): prepare the data again")
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


def is_shards(folder: Path) -> bool:
    return (folder / manifest.MANIFEST).is_file()


def read_shards(folder: Path) -> Shards:
    """OneblockError where the folder is none, or its manifest was changed."""
    if not is_shards(folder):
        raise OneblockError(
            f"{folder} holds no prepared data (no {manifest.MANIFEST}): make it with oneblock data prepare"
        )
    found = manifest.read(folder)
    try:
        return Shards(folder, *(found[key] for key in ("dtype", "vocab", "tokens", "documents", "tokenizer")))
    except KeyError as e:
        raise OneblockError(f"{folder} holds something else: its manifest has no {e}") from None


def fingerprint(folder: Path) -> str:
    """Of the tokenizer in a folder of shards: the beginning of its sha256."""
    return str(manifest.sum_of(folder / TOKENIZER / "tokenizer.json")["sha256"])[:16]


def dtype_for(vocab: int) -> str:
    return "uint16" if vocab <= 2**16 else "uint32"


def open_all(folders: Sequence[Path]) -> tuple[list[Shards], Tokenizer]:
    """Several folders to learn from, which must have one tokenizer. Their numbers are in the refusal."""
    found = [read_shards(folder) for folder in folders]
    first = found[0]
    for other in found[1:]:
        if other.fingerprint != first.fingerprint:
            raise OneblockError(
                f"{first.folder} and {other.folder} were made by different tokenizers "
                f"({first.vocab:,} tokens, {first.fingerprint}, and {other.vocab:,}, {other.fingerprint}): "
                f"prepare both with the same"
            )
    return found, first.tokenizer
