"""A model to a folder that transformers, and everything that reads its folders, can load."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.files import replace_folder
from oneblock.model import Decoder
from oneblock.store.config import CONFIG, family_of, read_json, write_config
from oneblock.store.header import SIZES, build_header
from oneblock.store.load import GENERATION, INDEX, SINGLE, Checkpoint, head_name, on_meta, parameter_shapes
from oneblock.store.manifest import MANIFEST
from oneblock.store.name_tables import DiskTensor, DiskTensors, Family, Layout, map_tensors, naming_schemes
from oneblock.store.tensors import CODES, chunks

SHARD = 5_000_000_000  # bytes


def save_model(
    folder: str | Path,
    model: Decoder | Checkpoint,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    *,
    layout: Layout | None = None,
    max_shard_size: int = SHARD,
) -> None:
    """Save a model in one step: the folder holds the old one or the new one, never half of one.

    A `Checkpoint` is saved as it was loaded: its configuration, its names, its tied head if that was stored. Without
    a configuration one is made from the spec. Other files of the folder stay. OneblockError where the disk is full.
    """
    with replace_model_folder(folder) as new:
        write_model(new, model, config, generation, layout=layout, max_shard_size=max_shard_size)


@contextmanager
def replace_model_folder(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder that replaces `folder` at the end; files that are not of the old model are carried over."""
    target = Path(folder).expanduser()
    if (target / MANIFEST).exists():
        raise OneblockError(
            f"{folder}: is a training checkpoint or prepared data, whose {MANIFEST} would no longer match; "
            f"choose another folder"
        )
    if target.is_dir() and not (target / CONFIG).exists() and any(path.is_dir() for path in target.iterdir()):
        raise OneblockError(f"{folder}: holds folders and no {CONFIG}, so it is not a model's; choose a new folder")
    with replace_folder(target, _model_files) as new:
        yield new


def _model_files(folder: Path) -> set[str]:
    """The files of the model in a folder: its configuration, and the weights that it or its index names."""
    names = {CONFIG, GENERATION, SINGLE, INDEX}
    if (folder / INDEX).exists():
        with suppress(OneblockError):  # a damaged index names no files
            weight_map = read_json(folder / INDEX).get("weight_map")
            names |= {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    return names


def write_model(
    folder: Path,
    model: Decoder | Checkpoint,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    *,
    layout: Layout | None = None,
    max_shard_size: int = SHARD,
) -> None:
    """Write a model's files into an existing folder: for use inside `replace_model_folder`."""
    if isinstance(model, Checkpoint):
        config = model.config if config is None else config
        generation = model.generation if generation is None else generation
        model, layout = model.model, layout or model.layout
    config = write_config(model.spec) if config is None else config
    family = family_of(config)
    if family.read(config) != model.spec:
        raise OneblockError(
            f"{folder.name}: the configuration describes another model; save without one to have it made"
        )
    files = weight_files(_named(family, model, layout), dict(model.named_parameters()), max_shard_size)
    for name, held in files.items():
        write_file(folder / name, held, dict(model.named_parameters()))
    _write_index(folder, files, dict(model.named_parameters()))
    write_settings(folder, model, config, generation)


def model_files(model: Decoder, parts: int) -> dict[str, DiskTensors]:
    """The weight files of a model and what each holds, about `parts` of them: for processes that share the writing."""
    tensors = dict(model.named_parameters())
    slots = _named(family_of(write_config(model.spec)), model, None)
    total = sum(_bytes(slot, tensors) for slot in slots.values())
    return weight_files(slots, tensors, min(SHARD, -(-total // parts)))


def write_config_files(folder: Path, model: Decoder, files: dict[str, DiskTensors]) -> None:
    """What stands beside the weight files."""
    _write_index(folder, files, dict(model.named_parameters()))
    write_settings(folder, model, write_config(model.spec))


def _named(family: Family, model: Decoder, layout: Layout | None) -> DiskTensors:
    """The disk tensors to write, in the model's order."""
    shapes = parameter_shapes(model)
    strange = shapes.keys() ^ parameter_shapes(on_meta(model.spec)).keys()
    if strange:
        raise OneblockError(f"parameter {min(strange)!r} is not the spec's: merge or remove what was added, then save")
    if layout is None or layout.family != family.model_types[0]:
        layout = Layout(family.model_types[0])
    tables = [map_tensors(table, model.spec, shapes) for table in family.tables]
    whole = [i for i, known in enumerate(tables) if known is not None]
    wanted = (layout.table if layout.table in whole else whole[0], layout.prefix)
    rename = next(rename for table, prefix, rename in naming_schemes(family) if (table, prefix) == wanted)
    order = {name: i for i, name in enumerate(shapes)}
    by_place = sorted((tables[wanted[0]] or {}).items(), key=lambda item: order[item[1].parts[0].name])
    found = {rename(name): slot for name, slot in by_place}
    if layout.stored_head and model.spec.tied:
        found[rename(head_name(family))] = next(s for s in found.values() if s.parts[0].name == "embed.weight")
    return found


def write_settings(
    folder: Path, model: Decoder, config: dict[str, Any], generation: dict[str, Any] | None = None
) -> None:
    """config.json, and generation_config.json where there are such habits."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    _write_json(folder / CONFIG, {**config, key: str(model.dtype).removeprefix("torch.")})
    if generation:
        _write_json(folder / GENERATION, generation)


def weight_files(slots: DiskTensors, tensors: Mapping[str, Tensor], max_shard_size: int) -> dict[str, DiskTensors]:
    """One file, or several with their numbers."""
    shards = _shards(slots, tensors, max_shard_size)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def _write_index(folder: Path, files: dict[str, DiskTensors], tensors: Mapping[str, Tensor]) -> None:
    if len(files) == 1:
        return
    where = {slot: name for name, held in files.items() for slot in held}
    total = sum(_bytes(slot, tensors) for held in files.values() for slot in held.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shards(slots: DiskTensors, tensors: Mapping[str, Tensor], limit: int) -> list[DiskTensors]:
    """Runs of tensors of at most `limit` bytes, or of one larger tensor."""
    shards: list[DiskTensors] = [{}]
    size = 0
    for name, slot in slots.items():
        count = _bytes(slot, tensors)
        if shards[-1] and size + count > limit:
            shards.append({})
            size = 0
        shards[-1][name] = slot
        size += count
    return shards


def write_file(path: Path, slots: DiskTensors, tensors: Mapping[str, Tensor]) -> None:
    header = build_header({name: (_code(slot, tensors), slot.shape) for name, slot in slots.items()})
    with path.open("wb") as file:
        file.write(header)
        for slot in slots.values():
            for chunk in chunks(slot, tensors, _dtype(slot, tensors)):
                file.write(chunk.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. The library's error of a full disk becomes an OSError."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _dtype(slot: DiskTensor, tensors: Mapping[str, Tensor]) -> torch.dtype:
    return tensors[slot.parts[0].name].dtype


def _code(slot: DiskTensor, tensors: Mapping[str, Tensor]) -> str:
    dtype = _dtype(slot, tensors)
    if dtype not in CODES:
        raise OneblockError(f"weights of dtype {dtype} cannot be saved: convert the model to bf16, fp16 or fp32 first")
    return CODES[dtype]


def _bytes(slot: DiskTensor, tensors: Mapping[str, Tensor]) -> int:
    return torch.Size(slot.shape).numel() * SIZES[_code(slot, tensors)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
