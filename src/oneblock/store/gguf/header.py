"""The header of a GGUF file, checked before anything in the file is used.

A file is four letters, a version, the numbers of tensors and of metadata keys, the metadata (key, kind, value), the
tensors (name, shape, type, offset), and their bytes. The library's own reader allocates what the header says; this
one compares each number with the bytes that are left.
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
from oneblock.store.gguf.metadata import shorten
from oneblock.store.tensors import DOWNLOAD_AGAIN, TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes: five times the largest vocabularies
MAX_STRINGS = 1 << 22  # a Python string takes ten times the bytes of an empty one in the file
MAX_COUNT = 1 << 16  # tensors, metadata keys
MAX_NAME = 128  # letters: the format's own limit
MIN_KEY, MIN_TENSOR = 13, 32  # bytes
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass(frozen=True)
class Header:
    """Metadata by key (arrays of numbers as numpy's), and tensors by name, their shapes in torch's order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class HeaderReader:
    """Reads a header's values in order, never past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.bytes_left, self.strings_left = min(self.size, MAX_HEADER), MAX_STRINGS

    def fail(self, problem: str) -> NoReturn:
        raise OneblockError(f"{self.path}: {problem}; {DOWNLOAD_AGAIN}")

    def read(self, count: int) -> bytes:
        if count > self.bytes_left:
            self.fail(f"the header needs {count} more bytes, {self.bytes_left} are left")
        self.bytes_left -= count
        data = self.file.read(count)
        if len(data) != count:
            self.fail("the file became shorter while it was read")
        return data

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def count(self, min_bytes: int, limit: int, unit: str) -> int:
        """The number of items that follow, each of at least `min_bytes`."""
        count = self.number("<Q")
        if count > limit or count * min_bytes > self.bytes_left:
            self.fail(f"the header announces {count} {unit}, more than it can hold")
        return count

    def string(self) -> str:
        self.strings_left -= 1
        if self.strings_left < 0:
            self.fail(f"the header has more than {MAX_STRINGS} strings")
        data = self.read(self.count(1, MAX_HEADER, "bytes of text"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"a string of the header is not UTF-8 ({data[:20]!r})")

    def value(self) -> Any:
        kind = self.number("<I")
        is_array = kind == ARRAY
        kind = self.number("<I") if is_array else kind
        if kind == STRING:
            return [self.string() for _ in range(self.count(8, MAX_STRINGS, "strings"))] if is_array else self.string()
        if kind not in SCALARS:
            self.fail(f"a metadata value has the unknown kind {kind}")
        if not is_array:
            number = self.number(SCALARS[kind])
            return bool(number) if kind == BOOL else number
        dtype = np.dtype(SCALARS[kind])
        array = np.frombuffer(self.read(self.count(dtype.itemsize, MAX_HEADER, "numbers") * dtype.itemsize), dtype)
        return array != 0 if kind == BOOL else array


def read_header(path: Path) -> Header:
    """The metadata and the tensors of a file. OneblockError if they do not describe exactly this file."""
    try:
        with path.open("rb") as file:
            return _read(HeaderReader(path, file))
    except OSError as error:
        raise OneblockError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _read(reader: HeaderReader) -> Header:
    _check_magic(reader)
    n_tensors = reader.count(MIN_TENSOR, MAX_COUNT, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(MIN_KEY, MAX_COUNT, "metadata keys")):
        key = reader.string()
        if key in metadata:
            reader.fail(f"the metadata key {shorten(key)} occurs twice")
        metadata[key] = reader.value()
    descriptions = [_read_description(reader) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        reader.fail(f"general.alignment is {shorten(alignment)}, not a power of two")
    data = -(-reader.file.tell() // alignment) * alignment
    infos = [_tensor_info(reader, data, alignment, *description) for description in descriptions]
    _check_overlaps(reader, infos)
    return Header(reader.path, metadata, {info.name: info for info in infos})


def _check_magic(reader: HeaderReader) -> None:
    magic = reader.read(min(4, reader.bytes_left))
    if magic != MAGIC:
        reader.fail(f"is not a GGUF file (it begins with {magic!r})")
    version = reader.number("<I")
    if version & 0xFFFF == 0 and version:
        raise OneblockError(f"{reader.path}: is big-endian, which is not supported; get the little-endian file")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise OneblockError(f"{reader.path}: is GGUF version {version}, supported are {known}; get a newer file")


def _read_description(reader: HeaderReader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of the next tensor. The file has the row's length first."""
    name, n_dims = reader.string(), reader.number("<I")
    if not 1 <= n_dims <= 4 or len(name) > MAX_NAME:
        reader.fail(f"tensor {shorten(name)} has {n_dims} dimensions and a name of {len(name)} letters")
    shape = tuple(reader.number("<Q") for _ in range(n_dims))[::-1]
    return name, shape, reader.number("<I"), reader.number("<Q")


def _tensor_info(
    reader: HeaderReader, data: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> TensorInfo:
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        reader.fail(f"tensor {name!r} has the unknown type {kind}")
    code, count = GGMLQuantizationType(kind).name, math.prod(shape)
    if not count or count > 1 << 40 or shape[-1] % block:
        reader.fail(f"tensor {name!r} has the shape {list(shape)}, which {code} cannot store")
    start = data + offset
    end = start + count // block * block_bytes
    if end > reader.size or offset % alignment:
        reader.fail(f"tensor {name!r} is at bytes {start} to {end} of a file of {reader.size}")
    return TensorInfo(reader.path, name, code, shape, start, end)


def _check_overlaps(reader: HeaderReader, infos: list[TensorInfo]) -> None:
    if len({info.name for info in infos}) != len(infos):
        reader.fail("a tensor's name occurs twice")
    end = 0
    for info in sorted(infos, key=lambda info: info.start):
        if info.start < end:
            reader.fail(f"tensor {info.name!r} overlaps another")
        end = info.end
