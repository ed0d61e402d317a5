"""The header of a GGUF file, checked before anything in the file is used.

A file is four letters, a version, the numbers of tensors and of settings, the settings (key, kind, value), the tensors
(name, shape, type, offset), and their bytes. The library's own reader trusts every number it meets; this one holds
each against what is left of the file.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from oneblock.errors import OneblockError
from oneblock.store.gguf.metadata import brief
from oneblock.store.header import AGAIN, Entry

Settings = dict[str, Any]

LETTERS = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes: five times the largest vocabularies
MAX_TEXTS = 1 << 22  # strings of the header: in memory each takes ten times the bytes that an empty one has in the file
MAX_COUNT = 1 << 16  # tensors, settings
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, TEXT, ARRAY = 7, 8, 9
LONGEST_NAME = 128  # letters: the format's own limit
LEAST_SETTING, LEAST_TENSOR = 13, 32  # bytes


@dataclass(frozen=True)
class Header:
    """Settings by key (arrays of numbers as numpy's), and tensors by name, their shapes as torch writes them."""

    path: Path
    settings: Settings
    tensors: dict[str, Entry]


class Cursor:
    """The header from its beginning, never past the file's end."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.left = min(self.size, MAX_HEADER)
        self.texts = MAX_TEXTS

    def fail(self, what: str) -> NoReturn:
        raise OneblockError(f"{self.path}: {what}; {AGAIN}")

    def take(self, count: int) -> bytes:
        if count > self.left:
            self.fail(f"the header needs {count} bytes more where {self.left} are left")
        self.left -= count
        found = self.file.read(count)
        if len(found) != count:
            self.fail("the file became shorter while it was read")
        return found

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, least: int, limit: int, what: str) -> int:
        """How many of something follow, each of at least so many bytes."""
        found = self.number("<Q")
        if found > limit or found * least > self.left:
            self.fail(f"the header speaks of {found} {what}, which it cannot hold")
        return found

    def text(self) -> str:
        self.texts -= 1
        if self.texts < 0:
            self.fail(f"the header has more than {MAX_TEXTS} texts")
        data = self.take(self.count(1, MAX_HEADER, "bytes of text"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"a text of the header is no UTF-8 ({data[:20]!r})")

    def value(self) -> Any:
        kind = self.number("<I")
        return self._array() if kind == ARRAY else self._single(kind)

    def _single(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind not in SCALARS:
            self.fail(f"a setting has the unknown kind {kind}")
        found = self.number(SCALARS[kind])
        return bool(found) if kind == BOOL else found

    def _array(self) -> Any:
        kind = self.number("<I")
        if kind == TEXT:
            return [self.text() for _ in range(self.count(8, MAX_TEXTS, "texts"))]
        if kind not in SCALARS:
            self.fail(f"an array has values of the unknown kind {kind}")
        dtype = np.dtype(SCALARS[kind])
        count = self.count(dtype.itemsize, MAX_HEADER, "numbers")
        found = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return found != 0 if kind == BOOL else found


def read_header(path: Path) -> Header:
    """What a file says of itself; OneblockError where that does not describe this file."""
    try:
        with path.open("rb") as file:
            return _read(Cursor(path, file))
    except OSError as error:
        raise OneblockError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _read(cursor: Cursor) -> Header:
    _check_beginning(cursor)
    n_tensors = cursor.count(LEAST_TENSOR, MAX_COUNT, "tensors")
    n_settings = cursor.count(LEAST_SETTING, MAX_COUNT, "settings")
    settings: Settings = {}
    for _ in range(n_settings):
        key = cursor.text()
        if key in settings:
            cursor.fail(f"the setting {brief(key)} stands twice")
        settings[key] = cursor.value()
    described = [_described(cursor) for _ in range(n_tensors)]
    start = _aligned(cursor.file.tell(), _alignment(cursor, settings))
    entries = [_entry(cursor, start, _alignment(cursor, settings), *found) for found in described]
    _check_apart(cursor, entries)
    return Header(cursor.path, settings, {entry.name: entry for entry in entries})


def _check_beginning(cursor: Cursor) -> None:
    first = cursor.take(min(4, cursor.left))
    if first != LETTERS:
        cursor.fail(f"is no GGUF file (it begins with {first!r})")
    version = cursor.number("<I")
    if version & 0xFFFF == 0 and version:
        raise OneblockError(f"{cursor.path}: has its bytes in the order of other machines; get it in the usual one")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise OneblockError(f"{cursor.path}: is GGUF of version {version}, known are {known}; get a newer file")


def _alignment(cursor: Cursor, settings: Settings) -> int:
    found = settings.get("general.alignment", 32)
    if type(found) is not int or not 1 <= found <= 1 << 20 or found & (found - 1):
        cursor.fail(f"general.alignment is {brief(found)}, no power of two")
    return found


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _described(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of the next tensor. The file has the row's length first."""
    name, n_dims = cursor.text(), cursor.number("<I")
    if not 1 <= n_dims <= 4 or len(name) > LONGEST_NAME:
        cursor.fail(f"tensor {brief(name)} has {n_dims} dimensions and a name of {len(name)} letters")
    shape = tuple(cursor.number("<Q") for _ in range(n_dims))[::-1]
    return name, shape, cursor.number("<I"), cursor.number("<Q")


def _entry(
    cursor: Cursor, start: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Entry:
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        cursor.fail(f"tensor {name!r} has the unknown type {kind}")
    kind_name, total = GGMLQuantizationType(kind).name, math.prod(shape)
    if not total or total > 1 << 40 or shape[-1] % block:
        cursor.fail(f"tensor {name!r} has the shape {list(shape)}, which {kind_name} cannot store")
    first = start + offset
    end = first + total // block * size
    if end > cursor.size or offset % alignment:
        cursor.fail(f"tensor {name!r} lies at bytes {first} to {end} of a file of {cursor.size}")
    return Entry(cursor.path, name, kind_name, shape, first, end)


def _check_apart(cursor: Cursor, entries: list[Entry]) -> None:
    if len({entry.name for entry in entries}) != len(entries):
        cursor.fail("a tensor's name stands twice")
    last = 0
    for entry in sorted(entries, key=lambda e: e.start):
        if entry.start < last:
            cursor.fail(f"tensor {entry.name!r} overlaps another")
        last = entry.end
