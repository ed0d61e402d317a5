"""A model folder to a model: built without memory, then given the file's own pages or copies made slab by slab."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.spec import Spec
from oneblock.store.config import family_of, read_config, read_json
from oneblock.store.header import Entry, read_header
from oneblock.store.name_tables import (
    WRAPPER_PREFIXES,
    DiskTensor,
    DiskTensors,
    Family,
    Layout,
    is_ignored,
    map_tensors,
    naming_schemes,
)
from oneblock.store.tensors import CODES, DTYPES, Maps, Source, copy_in, mappable, mapped

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
WORKERS = 4  # as many slabs in memory at a time
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.msgpack", "*.h5")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder. `layout` is what saving needs to give the same names back."""

    model: Decoder
    spec: Spec
    config: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None


def load_model(
    folder: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """The model of a Hugging Face folder, its weights in `dtype` (None: as most of them are stored).

    On the CPU and without a change of dtype the weights stay in the file's pages, which come in as they are used and
    are copied only where they are written to. OneblockError where the folder is not a whole, sound model.
    """
    folder = Path(folder)
    spec, config = read_config(folder)
    if config.get("quantization_config"):
        raise OneblockError(
            f"{folder}: its weights are quantised, to generate with only; give the model it was made of"
        )
    family = family_of(config)
    entries = find_tensors(folder)
    model = on_meta(spec)
    match = _match(family, spec, model, entries)
    _check(folder, family, match, entries)
    target = _dtype(dtype, match.slots, entries)
    if match.layout.stored_head and not _same_head(entries, match):
        # transformers trusts the two matrices over the configuration, too
        config, spec = {**config, "tie_word_embeddings": False}, replace(spec, tied=False)
        model, match = _untied(family, spec, entries)
    _fill(model, match.slots, entries, target, torch.device(device))
    return Checkpoint(model, spec, config, read_generation(folder), match.layout)


def read_generation(folder: Path) -> dict[str, Any]:
    """How the folder's model is used to choose tokens; empty where it does not say."""
    path = folder / GENERATION
    return read_json(path) if path.exists() else {}


def on_meta(spec: Spec) -> Decoder:
    """The model without memory for its weights."""
    with torch.device("meta"), _NoStart():
        return Decoder(spec)


class _NoStart(TorchFunctionMode):
    """Passes over the drawing of first weights: even without memory it costs a second of imports inside torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes; a tied head is not named, since it is the embedding."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


# ------------------------------------------------------------------ which files


def find_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's safetensors files."""
    index = folder / INDEX
    if index.exists():
        return _sharded(folder, index)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise OneblockError(
            f"{folder}: {pickles[0]} is a pickle, which could run code when opened; if you trust it, convert it: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(folder)!r}).save_pretrained('converted')\""
        )
    raise OneblockError(f"{folder}: has no {SINGLE} and no {INDEX}; give a folder that holds a model's weights")


def _sharded(folder: Path, index: Path) -> dict[str, Entry]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in where.values()
    ):
        raise OneblockError(f"{index}: has no weight_map of tensors to files in this folder; get the file again")
    entries: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).exists():
            raise OneblockError(f"{folder / file}: is missing, though {INDEX} names it; get it again")
        for name, entry in read_header(folder / file).items():
            if name in entries:
                raise OneblockError(
                    f"{folder / file}: tensor {name!r} is in {entries[name].path.name} too; get both again"
                )
            entries[name] = entry
    for name, file in where.items():
        if name not in entries or entries[name].path.name != file:
            raise OneblockError(
                f"{folder / file}: tensor {name!r} is missing, though {INDEX} puts it there; get it again"
            )
    return entries


# ------------------------------------------------------------------ which tensor is which


@dataclass(frozen=True)
class Match:
    """The disk tensors a model needs, named as this folder names them."""

    slots: DiskTensors
    layout: Layout
    head: str = ""  # the stored name of a tied head


def _match(family: Family, spec: Spec, model: Decoder, entries: dict[str, Entry]) -> Match:
    """The way of naming that leaves the fewest tensors missing."""
    shapes = parameter_shapes(model)
    tables = [map_tensors(table, spec, shapes) for table in family.tables]
    best: Match | None = None
    fewest = len(shapes) * 1000
    for table, prefix, rename in naming_schemes(family):
        known = tables[table]
        if known is None:
            continue
        named = {rename(name): slot for name, slot in known.items()}
        missing = len(named.keys() - entries.keys())
        if missing < fewest:
            head = rename(head_name(family))
            stored = spec.tied and head in entries
            kept = None if prefix in WRAPPER_PREFIXES else prefix  # the text side is saved as a text model
            best, fewest = Match(named, Layout(family.model_types[0], table, kept, stored), head), missing
    assert best is not None, f"no table of {family.model_types[0]} names every parameter"
    return best


def head_name(family: Family) -> str:
    return next(disk for disk, ours in family.tables[0].items() if ours == "head") + ".weight"


def _untied(family: Family, spec: Spec, entries: dict[str, Entry]) -> tuple[Decoder, Match]:
    model = on_meta(spec)
    return model, _match(family, spec, model, entries)


def _check(folder: Path, family: Family, match: Match, entries: dict[str, Entry]) -> None:
    """Every tensor the model needs, in its shape and a dtype we compute in, and no other."""
    missing = [name for name in match.slots if name not in entries]
    if missing:
        raise OneblockError(
            f"{folder}: tensor {missing[0]!r} is missing{_more(missing)}; the weights are incomplete, or config.json "
            f"is another model's: get the folder again"
        )
    for name, slot in match.slots.items():
        entry = entries[name]
        if entry.shape != slot.shape:
            raise OneblockError(
                f"{entry.path}: tensor {name!r} has shape {list(entry.shape)} where config.json makes it "
                f"{list(slot.shape)}; get the folder again, or mend config.json"
            )
        if entry.dtype not in DTYPES:
            raise OneblockError(
                f"{entry.path}: tensor {name!r} is {entry.dtype}, not one of {', '.join(DTYPES)}; get the "
                f"model in one of these"
            )
    head = match.head if match.layout.stored_head else None
    extra = [n for n in entries if n not in match.slots and n != head and not is_ignored(n, family)]
    if extra:
        raise OneblockError(
            f"{entries[extra[0]].path}: tensor {extra[0]!r} has no place in a {family.model_types[0]} "
            f"model{_more(extra)}; config.json may be another model's: get the folder again"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _same_head(entries: dict[str, Entry], match: Match) -> bool:
    embed = next(name for name, slot in match.slots.items() if slot.parts[0].name == "embed.weight")
    a, b = entries[embed], entries[match.head]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows, columns = a.shape
    row_bytes = (a.end - a.start) // rows
    with Source(a) as ours, Source(b) as theirs:  # not mapped, as pages that were looked at stay in memory
        return all(
            torch.equal(ours.read((1, columns), i * row_bytes), theirs.read((1, columns), i * row_bytes))
            for i in range(rows)
        )


# ------------------------------------------------------------------ the weights themselves


def _dtype(asked: str | torch.dtype | None, slots: DiskTensors, entries: dict[str, Entry]) -> torch.dtype:
    if asked is None:
        stored: dict[str, int] = {}
        for name in slots:
            entry = entries[name]
            stored[entry.dtype] = stored.get(entry.dtype, 0) + entry.end - entry.start
        return DTYPES[max(stored, key=lambda code: stored[code])]
    return as_dtype(asked)


def as_dtype(asked: str | torch.dtype) -> torch.dtype:
    """A dtype by its name. OneblockError where models do not compute in it."""
    dtype = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if dtype not in CODES:
        known = ", ".join(str(d).removeprefix("torch.") for d in CODES)
        raise OneblockError(f"dtype {asked!r} is not one a model computes in: choose one of {known}")
    return dtype


def _fill(
    model: Decoder, slots: DiskTensors, entries: dict[str, Entry], dtype: torch.dtype, device: torch.device
) -> None:
    """Give the meta model its weights. Tensors that cannot be mapped are made once, then filled piece by piece."""
    shapes = parameter_shapes(model)
    maps, ready = Maps(), dict[str, Tensor]()
    rest: list[tuple[Entry, DiskTensor]] = []
    for name, slot in sorted(slots.items(), key=lambda item: (str(entries[item[0]].path), entries[item[0]].start)):
        if mappable(entries[name], slot, dtype, device):
            ready |= mapped(maps, entries[name], slot)
        else:
            rest.append((entries[name], slot))
    for name in dict.fromkeys(part.name for _, slot in rest for part in slot.parts):
        ready[name] = torch.empty(shapes[name], dtype=dtype, device=device)
    if rest:
        _copy_all(rest, ready)
    assign(model, ready)


def _copy_all(rest: list[tuple[Entry, DiskTensor]], ready: dict[str, Tensor]) -> None:
    """Disk tensors side by side, each in one thread: torch's own threads would wait for each other at every slab."""
    before = torch.get_num_threads()
    workers = ThreadPoolExecutor(min(WORKERS, before), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with workers:
            list(workers.map(lambda item: copy_in(item[0], item[1], ready), rest))  # raises what a thread raised
    finally:
        torch.set_num_threads(before)  # a part of the setting is the whole process's


def put(root: nn.Module, name: str, new: nn.Module | Tensor) -> None:
    """In the place of the module, parameter or buffer of this name."""
    owner, _, key = name.rpartition(".")
    setattr(root.get_submodule(owner), key, new)


def assign(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Give the model these parameters, by name."""
    for name, tensor in tensors.items():
        put(model, name, nn.Parameter(tensor))
    model.tie()
