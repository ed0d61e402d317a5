"""Tensors in and out of safetensors files: mapped where they can be used as they lie, copied slab by slab elsewhere.

A copy never holds more than one slab beside its result, and reads the file instead of the map, so that no page is
in memory twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.store.header import AGAIN, SIZES, Entry
from oneblock.store.name_tables import DiskTensor, TensorSlice

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SLAB = 1 << 20  # bytes: small enough to stay in the processor's cache


class Maps:
    """The files of a checkpoint as memory. A map lives on as long as a tensor uses it."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, entry: Entry) -> Tensor:
        """The tensor in the file's own pages. Writing to it changes this process's copy, never the file."""
        if entry.path not in self._maps:
            with entry.path.open("rb") as file:
                self._maps[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = (entry.end - entry.start) // SIZES[entry.dtype]
        memory, dtype = self._maps[entry.path], DTYPES[entry.dtype]
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


class Source:
    """A disk tensor open for reading piece by piece. Each thread has its own."""

    def __init__(self, entry: Entry):
        self.entry, self.dtype = entry, DTYPES[entry.dtype]
        self._file = entry.path.open("rb", buffering=0)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def fill(self, tensor: Tensor, start: int) -> Tensor:
        """Read a contiguous CPU tensor from byte `start` of the stored one."""
        memory, done = tensor.view(-1).view(torch.uint8).numpy().data, 0
        self._file.seek(self.entry.start + start)
        while done < len(memory):
            count = self._file.readinto(memory[done:])
            if not count:
                raise OneblockError(f"{self.entry.path}: ends inside tensor {self.entry.name!r}; {AGAIN}")
            done += count
        return tensor

    def read(self, shape: tuple[int, ...], start: int) -> Tensor:
        """The same into a tensor that lasts until the next read: slabs that came and went would leave holes."""
        size = torch.Size(shape).numel() * self.dtype.itemsize
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self.fill(self._scratch[:size].view(self.dtype).view(shape), start)


def mapped(maps: Maps, entry: Entry, slot: DiskTensor) -> dict[str, Tensor]:
    """The parts of a disk tensor without a copy; `mappable` says whether that can be."""
    whole = maps.view(entry)
    if len(slot.parts) == 1:
        return {slot.parts[0].name: whole}
    return {part.name: whole[part.start : part.start + part.size] for part in slot.parts}


def mappable(entry: Entry, slot: DiskTensor, dtype: torch.dtype, device: torch.device) -> bool:
    as_it_lies = _in_stretches(slot) and slot.expert is None and entry.end > entry.start
    aligned = entry.start % SIZES[entry.dtype] == 0
    return as_it_lies and aligned and device.type == "cpu" and DTYPES[entry.dtype] == dtype


def copy_in(entry: Entry, slot: DiskTensor, ours: Mapping[str, Tensor]) -> None:
    """Fill our tensors from one disk tensor."""
    with Source(entry) as source:
        if _in_stretches(slot):
            _copy_stretches(source, slot, ours)
        elif slot.transposed:
            _copy_turned(source, slot, ours)
        else:
            _copy_grid(source, slot, ours)


def _copy_stretches(source: Source, slot: DiskTensor, ours: Mapping[str, Tensor]) -> None:
    size = source.dtype.itemsize
    for part in slot.parts:
        target = _own(slot, ours[part.name]).view(-1)
        first = part.start * _row_bytes(slot, source.dtype)
        if target.device.type == "cpu" and target.dtype == source.dtype:
            source.fill(target, first)
            continue
        for items in _slabs(target.numel(), size):
            target[items].copy_(source.read((items.stop - items.start,), first + items.start * size))


def _copy_grid(source: Source, slot: DiskTensor, ours: Mapping[str, Tensor]) -> None:
    grid = _grid(slot)
    row_bytes = torch.Size(grid[1:]).numel() * source.dtype.itemsize
    for rows in _slabs(grid[0], row_bytes):
        slab = source.read((rows.stop - rows.start, *grid[1:]), rows.start * row_bytes)
        for part in slot.parts:
            _on_grid(slot, part, ours[part.name])[rows].copy_(_cut(slot, part, slab))


def _copy_turned(source: Source, slot: DiskTensor, ours: Mapping[str, Tensor]) -> None:
    """Fill our (out, in) matrices from stored (in, out) ones, one or a stack of them.

    torch transposes fast only between whole matrices of one dtype: four times as fast as copying into a view.
    """
    n_in, n_out = slot.shape[-2:]
    row_bytes = n_out * source.dtype.itemsize
    for i in range(slot.shape[0] if len(slot.shape) == 3 else 1):
        for rows in _slabs(n_in, row_bytes):
            shape = (rows.stop - rows.start, slot.groups, n_out // slot.groups)
            slab = source.read(shape, (i * n_in + rows.start) * row_bytes)
            for part in slot.parts:
                target = ours[part.name][i] if len(slot.shape) == 3 else ours[part.name]
                piece = slab[:, :, part.start : part.start + part.size].flatten(1)
                target[:, rows].copy_(piece.to(target.device, target.dtype).contiguous().t().contiguous())


def chunks(slot: DiskTensor, ours: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The bytes of one disk tensor, made from ours, as a run of contiguous CPU tensors."""
    if _in_stretches(slot):
        for part in slot.parts:
            source = _own(slot, ours[part.name].detach()).reshape(-1)
            for items in _slabs(source.numel(), dtype.itemsize):
                yield source[items].to("cpu", dtype)
        return
    grid = _grid(slot)
    row_bytes = dtype.itemsize * (torch.Size(grid[1:]).numel())
    for rows in _slabs(grid[0], row_bytes):
        slab = torch.empty((rows.stop - rows.start, *grid[1:]), dtype=dtype)
        for part in slot.parts:
            _cut(slot, part, slab).copy_(_on_grid(slot, part, ours[part.name].detach())[rows])
        yield slab


def _in_stretches(slot: DiskTensor) -> bool:
    """Whether each part is one run of bytes that is our tensor, or our expert, as it is."""
    return not slot.transposed and slot.groups == 1 and (slot.axis == 0 or len(slot.parts) == 1)


def _own(slot: DiskTensor, ours: Tensor) -> Tensor:
    return ours if slot.expert is None else ours[slot.expert]


def _row_bytes(slot: DiskTensor, dtype: torch.dtype) -> int:
    return torch.Size(slot.shape[1:]).numel() * dtype.itemsize


def _grid(slot: DiskTensor) -> tuple[int, ...]:
    """The disk tensor's shape with its joined dimension as (groups, all parts' sizes)."""
    joined = slot.shape[slot.axis] // slot.groups
    return (*slot.shape[: slot.axis], slot.groups, joined, *slot.shape[slot.axis + 1 :])


def _cut(slot: DiskTensor, part: TensorSlice, slab: Tensor) -> Tensor:
    return slab.narrow(slot.axis + 1, part.start, part.size)


def _on_grid(slot: DiskTensor, part: TensorSlice, ours: Tensor) -> Tensor:
    """Our tensor seen as its cut of the grid."""
    ours = _own(slot, ours)
    ours = ours.transpose(-1, -2) if slot.transposed else ours
    return ours.unflatten(slot.axis, (slot.groups, part.size))


def _slabs(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, SLAB // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
