"""A model to a Hugging Face folder, which transformers and every reader of its folders can load."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.files import replace_folder, write_file
from oneblock.model import Decoder
from oneblock.store.config import CONFIG, family_of, read_json, write_config
from oneblock.store.load import GENERATION, INDEX, SINGLE, Checkpoint, build_on_meta, head_name, parameter_shapes
from oneblock.store.manifest import MANIFEST
from oneblock.store.name_tables import DiskTensor, DiskTensors, Family, Layout, map_tensors, naming_schemes
from oneblock.store.tensors import CODES, build_header, stored_chunks

MAX_SHARD_SIZE = 5_000_000_000  # bytes


def save_model(folder: str | Path, model: Decoder | Checkpoint, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Save a model atomically: the folder holds the old model or the new one, never a mix.

    A `Checkpoint` is saved as it was loaded: configuration, tensor names, a stored tied head. Without a configuration
    one is made from the spec. Other files in the folder are kept. OneblockError if the disk is full.
    """
    with replace_model_folder(folder) as new:
        write_model(new, model, max_shard_size)


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


def write_model(folder: Path, model: Decoder | Checkpoint, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Write a model's files into an existing folder: for use inside `replace_model_folder`."""
    checkpoint = complete_checkpoint(model)
    model, family = checkpoint.model, family_of(checkpoint.config)
    if family.config.read(checkpoint.config) != model.spec:
        raise OneblockError(
            f"{folder.name}: the configuration describes another model; save without one to generate it from the spec"
        )
    parameters = dict(model.named_parameters())
    files = _split_into_shards(_name_tensors(family, model, checkpoint.layout), parameters, max_shard_size)
    for name, disk_tensors in files.items():
        write_weights(folder / name, disk_tensors, parameters)
    write_config_files(folder, checkpoint, files)


def complete_checkpoint(model: Decoder | Checkpoint) -> Checkpoint:
    """The model with a configuration, which is made from the spec where there is none."""
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(model, model.spec, {})
    return checkpoint if checkpoint.config else replace(checkpoint, config=write_config(checkpoint.model.spec))


def plan_weight_files(model: Decoder, count: int) -> dict[str, DiskTensors]:
    """About `count` weight files and the tensors of each, for processes that share the writing."""
    parameters = dict(model.named_parameters())
    disk_tensors = _name_tensors(family_of(write_config(model.spec)), model, None)
    total = sum(_stored_bytes(disk, parameters) for disk in disk_tensors.values())
    return _split_into_shards(disk_tensors, parameters, min(MAX_SHARD_SIZE, -(-total // count)))


def write_config_files(
    folder: Path, model: Decoder | Checkpoint, files: Mapping[str, DiskTensors] | None = None
) -> None:
    """Write config.json, generation_config.json unless it is empty, and the index if there are several `files`."""
    checkpoint = complete_checkpoint(model)
    model, config = checkpoint.model, checkpoint.config
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    _write_json(folder / CONFIG, {**config, key: str(model.dtype).removeprefix("torch.")})
    if checkpoint.generation:
        _write_json(folder / GENERATION, checkpoint.generation)
    if files and len(files) > 1:
        parameters = dict(model.named_parameters())
        weight_map = {tensor: name for name, disk_tensors in files.items() for tensor in disk_tensors}
        total = sum(_stored_bytes(disk, parameters) for tensors in files.values() for disk in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_weights(path: Path, disk_tensors: DiskTensors, parameters: Mapping[str, Tensor]) -> None:
    """Write one safetensors file from parameters, in chunks, without fsync."""
    dtypes = {name: _stored_dtype(disk, parameters) for name, disk in disk_tensors.items()}
    with path.open("wb") as file:
        file.write(build_header({name: (dtypes[name], disk.shape) for name, disk in disk_tensors.items()}))
        for name, disk in disk_tensors.items():
            for chunk in stored_chunks(disk, parameters, dtypes[name]):
                file.write(chunk.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file of whole tensors. The library's error of a full disk becomes an OSError."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _name_tensors(family: Family, model: Decoder, layout: Layout | None) -> DiskTensors:
    """The disk tensors to write, in the model's order."""
    shapes = parameter_shapes(model)
    unknown = shapes.keys() ^ parameter_shapes(build_on_meta(model.spec)).keys()
    if unknown:
        raise OneblockError(f"parameter {min(unknown)!r} is not the spec's: merge or remove what was added, then save")
    if layout is None or layout.family != family.model_types[0]:
        layout = Layout(family.model_types[0])
    tables = [map_tensors(table, model.spec, shapes) for table in family.tables]
    complete = [i for i, table in enumerate(tables) if table is not None]
    scheme = (layout.table if layout.table in complete else complete[0], layout.prefix)
    rename = next(rename for table, prefix, rename in naming_schemes(family) if (table, prefix) == scheme)
    order = {name: i for i, name in enumerate(shapes)}
    in_order = sorted((tables[scheme[0]] or {}).items(), key=lambda item: order[item[1].parts[0].name])
    disk_tensors = {rename(name): disk for name, disk in in_order}
    if layout.stored_head and model.spec.tied:
        embed = next(disk for disk in disk_tensors.values() if disk.parts[0].name == "embed.weight")
        disk_tensors[rename(head_name(family))] = embed
    return disk_tensors


def _split_into_shards(
    disk_tensors: DiskTensors, parameters: Mapping[str, Tensor], max_shard_size: int
) -> dict[str, DiskTensors]:
    """Files of at most `max_shard_size` bytes, or of one larger tensor."""
    shards: list[DiskTensors] = [{}]
    size = 0
    for name, disk in disk_tensors.items():
        count = _stored_bytes(disk, parameters)
        if shards[-1] and size + count > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = disk
        size += count
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def _stored_dtype(disk: DiskTensor, parameters: Mapping[str, Tensor]) -> torch.dtype:
    dtype = parameters[disk.parts[0].name].dtype
    if dtype not in CODES:
        raise OneblockError(f"weights of dtype {dtype} cannot be saved: convert the model to bf16, fp16 or fp32 first")
    return dtype


def _stored_bytes(disk: DiskTensor, parameters: Mapping[str, Tensor]) -> int:
    return math.prod(disk.shape) * _stored_dtype(disk, parameters).itemsize


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_file(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
