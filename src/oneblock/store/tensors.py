"""Tensors in and out of safetensors files: mapped where they can be used as they lie, copied slab by slab elsewhere.

A copy never holds more than one slab beside its result, and reads the file instead of the map, so that no page is
in memory twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.store.header import AGAIN, SIZES, Entry
from oneblock.store.rules import Part, Slot

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SLAB = 1 << 20  # bytes


class Reader:
    """The open files of a checkpoint. Its maps live on as long as a tensor uses them."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._open = ExitStack()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.close()

    def view(self, entry: Entry) -> Tensor:
        """The tensor in the file's own pages. Writing to it changes this process's copy, never the file."""
        if entry.path not in self._maps:
            self._maps[entry.path] = mmap.mmap(self._file(entry.path).fileno(), 0, access=mmap.ACCESS_COPY)
        count = (entry.end - entry.start) // SIZES[entry.dtype]
        flat = torch.frombuffer(self._maps[entry.path], dtype=DTYPES[entry.dtype], count=count, offset=entry.start)
        return flat.view(entry.shape)

    def fill(self, tensor: Tensor, entry: Entry, start: int) -> None:
        """Read a contiguous CPU tensor of the file's dtype from byte `start` of the stored one."""
        memory = tensor.view(-1).view(torch.uint8).numpy().data
        file, done = self._file(entry.path), 0
        file.seek(entry.start + start)
        while done < len(memory):
            count = file.readinto(memory[done:])  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise OneblockError(f"{entry.path}: ends inside tensor {entry.name!r}; {AGAIN}")
            done += count

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for one slab, the same each time: blocks that come and go between the weights would leave holes."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size].view(dtype).view(shape)

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._files:
            self._files[path] = self._open.enter_context(path.open("rb"))
        return self._files[path]


def mapped(reader: Reader, entry: Entry, slot: Slot) -> dict[str, Tensor]:
    """The parts of a disk tensor without a copy; `mappable` says whether that can be."""
    whole = reader.view(entry)
    if len(slot.parts) == 1:
        return {slot.parts[0].name: whole}
    return {part.name: whole[part.start : part.start + part.size] for part in slot.parts}


def mappable(entry: Entry, slot: Slot, dtype: torch.dtype, device: torch.device) -> bool:
    as_it_lies = _in_stretches(slot) and slot.expert is None and entry.end > entry.start
    aligned = entry.start % SIZES[entry.dtype] == 0
    return as_it_lies and aligned and device.type == "cpu" and DTYPES[entry.dtype] == dtype


def copy_in(reader: Reader, entry: Entry, slot: Slot, ours: Mapping[str, Tensor]) -> None:
    """Fill our tensors from one disk tensor."""
    dtype = DTYPES[entry.dtype]
    if _in_stretches(slot):
        for part in slot.parts:
            target = _own(slot, ours[part.name]).view(-1)
            first = part.start * _row_bytes(slot, dtype)
            straight = target.device.type == "cpu" and target.dtype == dtype
            for items in _slabs(target.numel(), dtype.itemsize):
                slab = target[items] if straight else reader.scratch((items.stop - items.start,), dtype)
                reader.fill(slab, entry, first + items.start * dtype.itemsize)
                if not straight:
                    target[items].copy_(slab)
        return
    if slot.turned:
        _copy_turned(reader, entry, slot, ours)
        return
    grid = _grid(slot)
    row_bytes = (entry.end - entry.start) // max(1, grid[0])
    for rows in _slabs(grid[0], row_bytes):
        slab = reader.scratch((rows.stop - rows.start, *grid[1:]), dtype)
        reader.fill(slab, entry, rows.start * row_bytes)
        for part in slot.parts:
            _on_grid(slot, part, ours[part.name])[rows].copy_(_cut(slot, part, slab))


def _copy_turned(reader: Reader, entry: Entry, slot: Slot, ours: Mapping[str, Tensor]) -> None:
    """Fill our (out, in) matrices from stored (in, out) ones, one or a stack of them.

    torch transposes fast only between whole matrices of one dtype: four times as fast as copying into a view.
    """
    dtype, (n_in, n_out) = DTYPES[entry.dtype], slot.shape[-2:]
    for i in range(slot.shape[0] if len(slot.shape) == 3 else 1):
        for rows in _slabs(n_in, n_out * dtype.itemsize):
            slab = reader.scratch((rows.stop - rows.start, slot.groups, n_out // slot.groups), dtype)
            reader.fill(slab, entry, (i * n_in + rows.start) * n_out * dtype.itemsize)
            for part in slot.parts:
                target = ours[part.name][i] if len(slot.shape) == 3 else ours[part.name]
                piece = slab[:, :, part.start : part.start + part.size].flatten(1)
                target[:, rows].copy_(piece.to(target.device, target.dtype).contiguous().t().contiguous())


def chunks(slot: Slot, ours: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
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


def _in_stretches(slot: Slot) -> bool:
    """Whether each part is one run of bytes that is our tensor, or our expert, as it is."""
    return not slot.turned and slot.groups == 1 and (slot.axis == 0 or len(slot.parts) == 1)


def _own(slot: Slot, ours: Tensor) -> Tensor:
    return ours if slot.expert is None else ours[slot.expert]


def _row_bytes(slot: Slot, dtype: torch.dtype) -> int:
    return torch.Size(slot.shape[1:]).numel() * dtype.itemsize


def _grid(slot: Slot) -> tuple[int, ...]:
    """The disk tensor's shape with its joined dimension as (groups, all parts' sizes)."""
    joined = slot.shape[slot.axis] // slot.groups
    return (*slot.shape[: slot.axis], slot.groups, joined, *slot.shape[slot.axis + 1 :])


def _cut(slot: Slot, part: Part, slab: Tensor) -> Tensor:
    return slab.narrow(slot.axis + 1, part.start, part.size)


def _on_grid(slot: Slot, part: Part, ours: Tensor) -> Tensor:
    """Our tensor seen as its cut of the grid."""
    ours = _own(slot, ours)
    ours = ours.transpose(-1, -2) if slot.turned else ours
    return ours.unflatten(slot.axis, (slot.groups, part.size))


def _slabs(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, SLAB // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
