"""A folder of prepared tokens.

manifest.json          tokens, documents, dtype, vocabulary, tokenizer fingerprint; size and sha256 of every file
shard-00000.bin        token ids, little-endian, 2 or 4 bytes each
shard-00000.ends       end of each document in the shard, 8 bytes each
tokenizer/             the tokenizer of the ids
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
class ShardFolder:
    """The contents of a folder's manifest."""

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
        """The ids, memory-mapped. File sizes are checked, checksums are not (`oneblock data verify` does)."""
        files = manifest.read(self.folder)["files"]
        parts, ends, tokens = [], [], 0
        for name in sorted(name for name in files if name.endswith(".bin")):
            ids = self._map_file(name, files, np.dtype(self.dtype).newbyteorder("<"))
            shard_ends = self._map_file(Path(name).with_suffix(".ends").name, files, np.dtype("<u8"))
            parts.append(ids)
            ends.append(np.asarray(shard_ends, np.int64) + tokens)
            tokens += len(ids)
        return Tokens(parts, np.concatenate(ends) if ends else np.zeros(0, np.int64))

    def _map_file(self, name: str, files: dict[str, Any], dtype: np.dtype[Any]) -> Any:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else -1
        if name not in files or size != files[name]["bytes"]:
            raise OneblockError(f"{path} is missing or truncated ({max(size, 0):,} bytes): prepare the data again")
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


def is_shard_folder(folder: Path) -> bool:
    return (folder / manifest.MANIFEST).is_file()


def read_shard_folder(folder: Path) -> ShardFolder:
    """Read the manifest. OneblockError where there is none, or it was changed."""
    if not is_shard_folder(folder):
        raise OneblockError(f"{folder} has no prepared data (no {manifest.MANIFEST}): use oneblock data prepare")
    about = manifest.read(folder)
    try:
        return ShardFolder(folder, *(about[key] for key in ("dtype", "vocab", "tokens", "documents", "tokenizer")))
    except KeyError as error:
        raise OneblockError(f"{folder} is not prepared data: its manifest has no {error}") from None


def fingerprint(folder: Path) -> str:
    """The first digits of the sha256 of the tokenizer in a folder of shards."""
    return str(manifest.hash_file(folder / TOKENIZER / "tokenizer.json")["sha256"])[:16]


def read_shard_folders(folders: Sequence[Path]) -> tuple[list[ShardFolder], Tokenizer]:
    """Read several folders, which must have one tokenizer."""
    shards = [read_shard_folder(folder) for folder in folders]
    first = shards[0]
    for other in shards[1:]:
        if other.fingerprint != first.fingerprint:
            raise OneblockError(
                f"{first.folder} and {other.folder} have different tokenizers "
                f"({first.vocab:,} tokens, {first.fingerprint}, and {other.vocab:,}, {other.fingerprint}): "
                f"prepare both with the same one"
            )
    return shards, first.tokenizer
