"""The header of a safetensors file, checked before anything in the file is used.

A file is 8 bytes (the header's length, little-endian), a JSON object name -> {dtype, shape, data_offsets}, and the
tensors one after another without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from oneblock.errors import OneblockError

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2}
SIZES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
MAX_HEADER = 100_000_000  # bytes: the format's own limit
AGAIN = "the file is damaged or half downloaded: get it again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes begin and end, counted from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name; OneblockError where the header does not describe exactly this file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise OneblockError(f"{path}: the header is cut short or damaged (file of {size} bytes); {AGAIN}")
            text = file.read(length)
    except OSError as error:
        raise OneblockError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    entries = [_entry(path, name, raw, 8 + length) for name, raw in _parsed(path, text).items()]
    _check_cover(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise OneblockError(f"{path}: the header is not valid JSON ({_line(error)}); {AGAIN}") from error
    if not isinstance(header, dict):
        raise OneblockError(f"{path}: the header is not a JSON object; {AGAIN}")
    header.pop("__metadata__", None)
    return header


def _entry(path: Path, name: str, raw: Any, data: int) -> Entry:
    def fail(what: str) -> NoReturn:
        raise OneblockError(f"{path}: tensor {name!r} {what}; {AGAIN}")

    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        fail("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        fail(f"has the unknown dtype {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        fail("has a shape or offsets that are not whole numbers")
    start, end = offsets
    if end - start != math.prod(shape) * SIZES[dtype]:
        fail(f"has {end - start} bytes where {dtype} of shape {shape} takes {math.prod(shape) * SIZES[dtype]}")
    return Entry(path, name, dtype, tuple(shape), data + start, data + end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _check_cover(path: Path, entries: list[Entry], data: int, size: int) -> None:
    """The tensors must fill the file from the header to its last byte, without overlap."""
    position, last = data, "the header"
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.end > size:
            raise OneblockError(
                f"{path}: tensor {entry.name!r} ends at byte {entry.end}, past the file's {size}; {AGAIN}"
            )
        if entry.start != position:
            how = "overlaps" if entry.start < position else "leaves a gap after"
            raise OneblockError(f"{path}: tensor {entry.name!r} {how} {last!r}; {AGAIN}")
        position, last = entry.end, entry.name
    if position != size:
        raise OneblockError(f"{path}: has {size - position} bytes after its last tensor; {AGAIN}")


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file with these tensors (name -> dtype, shape), stored in the mapping's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor then lies on an 8-byte boundary, where it can be mapped
    return len(text).to_bytes(8, "little") + text


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__
