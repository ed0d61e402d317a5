"""A GGUF file to a model and its tokenizer: the header held against the file, then tensor by tensor, rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.spec import Spec
from oneblock.store.config import family_of
from oneblock.store.gguf.blocks import PLAIN, READ, decode, size
from oneblock.store.gguf.config import architecture, read_config
from oneblock.store.gguf.header import Header, read_header
from oneblock.store.gguf.names import FREQS, LONG, SHORT, Place, places
from oneblock.store.gguf.tokenizer import ends, read_tokenizer
from oneblock.store.header import AGAIN, Entry
from oneblock.store.load import Checkpoint, as_dtype, assign, on_meta, parameter_shapes
from oneblock.store.name_tables import Shape
from oneblock.store.tensors import Maps
from oneblock.text import Tokenizer

SLAB = 1 << 20  # numbers
IGNORED = (FREQS, LONG, SHORT, ".attn_rot_embd.weight")


def load_gguf(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Checkpoint, Tokenizer | None]:
    """The model of a file, its weights in `dtype`, and its tokenizer if it has one.

    None: as most of the weights are stored, quantised ones as bfloat16. Weights that are stored as they are used stay
    in the file's pages. OneblockError where the file is not a whole, sound model.
    """
    header = read_header(Path(path))
    try:
        _check_single(header)
        spec, config = _spec(header)
        model = on_meta(spec)
        found = places(architecture(header.settings), family_of(config), spec, parameter_shapes(model))
        _check(header, found)
        target = _dtype(header, found) if dtype is None else as_dtype(dtype)
        tokenizer = read_tokenizer(header.settings, spec.vocab)
    except OneblockError as error:
        raise OneblockError(f"{path}: {error}") from error
    assign(model, _filled(header, found, parameter_shapes(model), target, torch.device(device)))
    config |= {"bos_token_id": tokenizer.bos_id if tokenizer else None, "eos_token_id": ends(header.settings)}
    return Checkpoint(model, spec, config), tokenizer


def _check_single(header: Header) -> None:
    if header.settings.get("split.count", 1) not in (0, 1):
        raise OneblockError("is one of several parts: join them first (llama-gguf-split --merge)")


def _spec(header: Header) -> tuple[Spec, dict[str, Any]]:
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    try:
        config = read_config(header.settings, shapes, _factors(header))
        _check_outline(shapes, config)
        return family_of(config).read(config), config
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:100]
        raise OneblockError(f"has a setting that makes no model ({reason}); {AGAIN}") from error


def _factors(header: Header) -> dict[str, Tensor]:
    """The divisors of the rotation, which are part of the configuration."""
    found = {}
    for name in (FREQS, LONG, SHORT):
        entry = header.tensors.get(name)
        if entry is not None:
            if entry.dtype != "F32" or len(entry.shape) != 1 or entry.shape[0] > 1 << 12:
                raise OneblockError(f"tensor {name!r} is no row of numbers in F32; {AGAIN}")
            found[name] = torch.cat([rows.clone() for _, rows in slabs(entry)])
    return found


def _check_outline(shapes: Mapping[str, Shape], config: dict[str, Any]) -> None:
    """Before a model of the size that the settings say is built: that the tensors speak of the same size."""
    if "token_embd.weight" not in shapes:
        raise OneblockError(f"tensor 'token_embd.weight' is missing; {AGAIN}")
    depth = config.get("num_hidden_layers") or config["n_layer"]
    if depth > len(shapes):
        raise OneblockError(f"speaks of {depth} layers and has {len(shapes)} tensors; {AGAIN}")


def _check(header: Header, found: dict[str, Place]) -> None:
    """Every tensor the model needs, in its shape and of a type we read, and no other."""
    missing = [name for name in found if name not in header.tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise OneblockError(f"tensor {missing[0]!r} is missing{more}; {AGAIN}")
    for name, place in found.items():
        entry = header.tensors[name]
        if entry.shape != place.shape:
            own = f"{list(entry.shape)} where the settings make it {list(place.shape)}"
            raise OneblockError(f"tensor {name!r} has shape {own}; {AGAIN}")
        if entry.dtype not in READ:
            raise OneblockError(f"tensor {name!r} is {entry.dtype}, which is not read; read are {', '.join(READ)}")
    extra = next((name for name in header.tensors if name not in found and not name.endswith(IGNORED)), None)
    if extra is not None:
        raise OneblockError(f"tensor {extra!r} has no place in this architecture as it is known here")


def _dtype(header: Header, found: dict[str, Place]) -> torch.dtype:
    stored: dict[torch.dtype, int] = {}
    for name in found:
        entry = header.tensors[name]
        dtype = PLAIN.get(entry.dtype, torch.bfloat16)
        stored[dtype] = stored.get(dtype, 0) + entry.end - entry.start
    return max(stored, key=lambda dtype: stored[dtype])


# ------------------------------------------------------------------ the weights themselves


def _filled(
    header: Header,
    found: dict[str, Place],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Our tensors: the file's own pages where those are as we use them, else made and filled."""
    maps, ready = Maps(), dict[str, Tensor]()
    for name, place in found.items():
        entry = header.tensors[name]
        if _as_it_lies(entry, place, dtype, device):
            whole = maps.view(entry)
            ready |= {part.name: whole[part.start : part.start + part.size] for part in place.parts}
        else:
            own = {p.name: torch.empty(shapes[p.name], dtype=dtype, device=device) for p in place.parts}
            fill(entry, place, own)
            ready |= own
    return ready


def _as_it_lies(entry: Entry, place: Place, dtype: torch.dtype, device: torch.device) -> bool:
    same = PLAIN.get(entry.dtype) == dtype and not place.heads and not place.offset
    return same and device.type == "cpu" and entry.start % dtype.itemsize == 0


def fill(entry: Entry, place: Place, ours: Mapping[str, Tensor]) -> None:
    """Our tensors from one of the file's."""
    order = place.order()
    for first, rows in slabs(entry):
        rows = rows.float() - place.offset if place.offset else rows
        last = first + len(rows)
        for part in place.parts:
            low, high = max(first, part.start), min(last, part.start + part.size)
            if low < high:
                where = slice(low - part.start, high - part.start) if order is None else order[low:high]
                target = rows_of(ours[part.name])
                target[where] = rows[low - first : high - first].to(target.device, target.dtype)


def rows_of(x: Tensor) -> Tensor:
    """A stack of matrices as the rows of all."""
    return x.flatten(0, 1) if x.dim() == 3 else x


def slabs(entry: Entry) -> Iterator[tuple[int, Tensor]]:
    """The numbers of a tensor as (first row, rows); a vector is one number a row."""
    columns = entry.shape[-1]
    count = math.prod(entry.shape[:-1])
    row_bytes, step = size(entry.dtype, columns), max(1, SLAB // columns)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        for first in range(0, count, step):
            data = np.empty((min(step, count - first), row_bytes), np.uint8)
            _read_into(file, data, entry)
            rows = decode(data, entry.dtype)
            yield first, rows[0] if len(entry.shape) == 1 else rows


def _read_into(file: Any, data: np.ndarray, entry: Entry) -> None:
    memory, done = data.reshape(-1).data, 0
    while done < len(memory):
        count = file.readinto(memory[done:])
        if not count:
            raise OneblockError(f"{entry.path}: ends inside tensor {entry.name!r}; {AGAIN}")
        done += count
