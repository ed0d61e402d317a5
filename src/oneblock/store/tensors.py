"""Tensors in and out of files: memory-mapped when layouts match, otherwise copied in chunks.

A copy holds one chunk beside its result. Chunks are read from the file and not from the map, so that no page is in
memory twice.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.store.name_tables import DiskTensor, TensorSlice

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # bytes: small enough to stay in the processor's cache
DOWNLOAD_AGAIN = "the file is damaged or incomplete; download it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `start` and `end` count bytes from the start of the file."""

    path: Path
    name: str
    dtype: str  # the format's code: "BF16", in GGUF files "Q4_0" too
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name; the library checks that the header describes exactly this file."""
    try:
        with safe_open(path, "pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise OneblockError(f"{path}: {' '.join(str(error).split())[:200]}; {DOWNLOAD_AGAIN}") from error
    except OSError as error:
        raise OneblockError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    header.pop("__metadata__", None)

    def info(name: str, raw: dict[str, Any]) -> TensorInfo:
        start, end = (8 + length + offset for offset in raw["data_offsets"])
        return TensorInfo(path, name, raw["dtype"], tuple(raw["shape"]), start, end)

    return {name: info(name, raw) for name, raw in header.items()}


def build_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file with these tensors, stored in the mapping's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts at a multiple of 8 bytes, so it can be mapped
    return len(text).to_bytes(8, "little") + text


class FileMaps:
    """The files of a checkpoint as memory. A map lives as long as a tensor uses it."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, info: TensorInfo) -> Tensor:
        """The tensor in the file's own pages. Writing to it changes this process's copy, never the file."""
        if info.path not in self._maps:
            with info.path.open("rb") as file:
                self._maps[info.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        memory, count = self._maps[info.path], math.prod(info.shape)
        return torch.frombuffer(memory, dtype=DTYPES[info.dtype], count=count, offset=info.start).view(info.shape)

    def parts(self, info: TensorInfo, disk: DiskTensor) -> dict[str, Tensor]:
        """The parameters in a stored tensor for which `is_mappable`, without a copy."""
        tensor = self.view(info)
        if len(disk.parts) == 1:
            return {disk.parts[0].name: tensor}
        return {part.name: tensor[part.start : part.start + part.size] for part in disk.parts}


def is_mappable(info: TensorInfo, disk: DiskTensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the stored bytes are the parameters' bytes."""
    same_layout = _is_contiguous(disk) and disk.expert is None and not disk.weight_offset
    aligned = info.start % dtype.itemsize == 0 and info.end > info.start
    return same_layout and aligned and device.type == "cpu" and DTYPES.get(info.dtype) == dtype


class TensorReader:
    """Reads one stored tensor in pieces; GGUF's block formats are dequantized to fp32. One per thread."""

    def __init__(self, info: TensorInfo):
        self.info, self.dtype = info, DTYPES.get(info.dtype, torch.float32)
        self._file = info.path.open("rb", buffering=0)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def read_into(self, tensor: Tensor, first: int) -> None:
        """Fill a contiguous CPU tensor of the stored dtype with the elements from `first` on."""
        memory, done = tensor.view(-1).view(torch.uint8).numpy().data, 0
        self._file.seek(self.info.start + self._bytes(first))
        while done < len(memory):
            count = self._file.readinto(memory[done:])
            if not count:
                raise OneblockError(f"{self.info.path}: ends inside tensor {self.info.name!r}; {DOWNLOAD_AGAIN}")
            done += count

    def read(self, shape: tuple[int, ...], first: int) -> Tensor:
        """The elements from `first` on. Valid until the next read: one buffer keeps the heap from fragmenting."""
        size = self._bytes(math.prod(shape))
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        data = self._buffer[:size]
        self.read_into(data, first)
        values = data.view(self.dtype) if self.info.dtype in DTYPES else dequantize(data.numpy(), self.info.dtype)
        return values.view(shape)

    def _bytes(self, count: int) -> int:
        """Bytes of so many elements; of block formats `count` is a multiple of the block."""
        return (self.info.end - self.info.start) * count // max(math.prod(self.info.shape), 1)


def dequantize(data: np.ndarray, code: str) -> Tensor:
    """The numbers in whole blocks of a GGUF type, fp32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants  # an extra

    kind = GGMLQuantizationType[code]
    with np.errstate(all="ignore"):  # a damaged block may have any scale, infinite too
        return torch.from_numpy(quants.dequantize(data.reshape(-1, GGML_QUANT_SIZES[kind][1]), kind))


# ------------------------------------------------------------------ copies


def copy_in(info: TensorInfo, disk: DiskTensor, parameters: Mapping[str, Tensor]) -> None:
    """Fill parameters from the stored tensor that holds them."""
    with TensorReader(info) as reader:
        if _is_contiguous(disk):
            _copy_contiguous(reader, disk, parameters)
        elif disk.transposed:
            _copy_transposed(reader, disk, parameters)
        else:
            _copy_grid(reader, disk, parameters)


def _copy_contiguous(reader: TensorReader, disk: DiskTensor, parameters: Mapping[str, Tensor]) -> None:
    for part in disk.parts:
        target = _select_expert(disk, parameters[part.name]).view(-1)
        first = part.start * math.prod(disk.shape[1:])
        same_dtype = target.dtype == DTYPES.get(reader.info.dtype) and not disk.weight_offset
        if same_dtype and target.device.type == "cpu":
            reader.read_into(target, first)
            continue
        for items in _chunks(target.numel(), reader.dtype.itemsize):
            values = reader.read((items.stop - items.start,), first + items.start)
            target[items].copy_(values.float() - disk.weight_offset if disk.weight_offset else values)


def _copy_grid(reader: TensorReader, disk: DiskTensor, parameters: Mapping[str, Tensor]) -> None:
    grid = _grid_shape(disk)
    row = math.prod(grid[1:])
    for rows in _chunks(grid[0], row * reader.dtype.itemsize):
        chunk = reader.read((rows.stop - rows.start, *grid[1:]), rows.start * row)
        for part in disk.parts:
            _on_grid(disk, part, parameters[part.name])[rows].copy_(_part_of(disk, part, chunk))


def _copy_transposed(reader: TensorReader, disk: DiskTensor, parameters: Mapping[str, Tensor]) -> None:
    """Fill (out, in) matrices from stored (in, out) ones, one or a stack of them.

    torch transposes fast only between contiguous matrices of one dtype: four times as fast as copying into a view.
    """
    n_in, n_out = disk.shape[-2:]
    for i in range(disk.shape[0] if len(disk.shape) == 3 else 1):
        for rows in _chunks(n_in, n_out * reader.dtype.itemsize):
            shape = (rows.stop - rows.start, disk.groups, n_out // disk.groups)
            chunk = reader.read(shape, (i * n_in + rows.start) * n_out)
            for part in disk.parts:
                target = parameters[part.name][i] if len(disk.shape) == 3 else parameters[part.name]
                piece = chunk[:, :, part.start : part.start + part.size].flatten(1)
                target[:, rows].copy_(piece.to(target.device, target.dtype).contiguous().t().contiguous())


def stored_chunks(disk: DiskTensor, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements of a stored tensor in file order, made from parameters: contiguous CPU tensors of `dtype`."""
    if _is_contiguous(disk):
        for part in disk.parts:
            source = _select_expert(disk, parameters[part.name].detach()).reshape(-1)
            for items in _chunks(source.numel(), dtype.itemsize):
                values = source[items].to("cpu", dtype)
                yield values + disk.weight_offset if disk.weight_offset else values
        return
    grid = _grid_shape(disk)
    for rows in _chunks(grid[0], math.prod(grid[1:]) * dtype.itemsize):
        chunk = torch.empty((rows.stop - rows.start, *grid[1:]), dtype=dtype)
        for part in disk.parts:
            _part_of(disk, part, chunk).copy_(_on_grid(disk, part, parameters[part.name].detach())[rows])
        yield chunk


def _is_contiguous(disk: DiskTensor) -> bool:
    """Whether each part is one run of bytes in the parameter's (or expert's) own order."""
    joined_rows = disk.axis == 0 or len(disk.parts) == 1
    return not disk.transposed and disk.groups == 1 and not disk.interleaved_heads and joined_rows


def _select_expert(disk: DiskTensor, parameter: Tensor) -> Tensor:
    return parameter if disk.expert is None else parameter[disk.expert]


def _grid_shape(disk: DiskTensor) -> tuple[int, ...]:
    """The stored shape with its joined dimension as (groups, all parts' sizes)."""
    if heads := disk.interleaved_heads:
        return (heads, disk.shape[0] // heads // 2, 2, *disk.shape[1:])
    joined = disk.shape[disk.axis] // disk.groups
    return (*disk.shape[: disk.axis], disk.groups, joined, *disk.shape[disk.axis + 1 :])


def _part_of(disk: DiskTensor, part: TensorSlice, chunk: Tensor) -> Tensor:
    return chunk if disk.interleaved_heads else chunk.narrow(disk.axis + 1, part.start, part.size)


def _on_grid(disk: DiskTensor, part: TensorSlice, parameter: Tensor) -> Tensor:
    """A view of the parameter in the grid's order."""
    if heads := disk.interleaved_heads:
        return parameter.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    parameter = _select_expert(disk, parameter)
    parameter = parameter.transpose(-1, -2) if disk.transposed else parameter
    return parameter.unflatten(disk.axis, (disk.groups, part.size))


def _chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
