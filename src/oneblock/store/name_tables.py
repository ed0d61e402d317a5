"""Tensor names and layouts of a model class on disk, as data, and the map of one model's disk tensors built from it.

A disk tensor may hold several of our parameters (fused, or interleaved rows), be stored as (in, out), or be one
expert of a stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from oneblock.spec import Spec

Shape = tuple[int, ...]
Interleave = Literal["per_head", "per_row"]  # q k v of each head in turn (GPT-NeoX); gate and up row by row (gpt-oss)


@dataclass(frozen=True)
class TensorRule:
    """One disk tensor made of one or more of our parameters, joined along their output dimension."""

    names: tuple[str, ...]
    transposed: bool = False  # weights are stored as (in, out): Conv1D, and the expert stacks of Llama 4 and gpt-oss
    interleave: Interleave | None = None
    cross: bool | None = None  # only in cross-attention layers, or only in the others


def rule(
    *names: str, transposed: bool = False, interleave: Interleave | None = None, cross: bool | None = None
) -> TensorRule:
    return TensorRule(names, transposed, interleave, cross)


Table = Mapping[str, str | TensorRule]  # disk module or tensor -> ours; {n} is the layer, {e} the expert


class Config(Protocol):
    """The configuration of a class, both ways."""

    def read(self, raw: dict[str, Any]) -> Spec: ...

    def write(self, spec: Spec) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Family:
    """A Hugging Face class: its configuration both ways, and its tensor names."""

    model_types: tuple[str, ...]  # the model_type values it reads; it writes the first
    architecture: str
    config: Config
    tables: tuple[Table, ...]  # the present names, then older or other ones
    prefix: str = "model."  # absent in the files of a model without its LM head
    buffers: tuple[str, ...] = ()  # suffixes of stored tensors that are not weights
    wrappers: tuple[str, ...] = ()  # model_type values of image-text models that hold this class as text_config


@dataclass(frozen=True)
class TensorSlice:
    """The place of one parameter in a disk tensor: `start` and `size` in each group of the joined dimension."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class DiskTensor:
    """One disk tensor: its shape and the parameters it holds."""

    shape: Shape
    parts: tuple[TensorSlice, ...]
    groups: int = 1  # repetitions of the parts along the joined dimension
    axis: int = 0  # the joined dimension, as stored
    transposed: bool = False
    expert: int | None = None  # its row in our stack of experts
    interleaved_heads: int = 0  # GGUF: rotated rows are interleaved pairs in each of so many heads, ours are halves
    weight_offset: float = 0.0  # GGUF: the stored numbers are ours plus this


DiskTensors = dict[str, DiskTensor]


def map_tensors(table: Table, spec: Spec, shapes: Mapping[str, Shape]) -> DiskTensors | None:
    """Every disk tensor of a model with parameters of these shapes; None if the table leaves a parameter out."""
    tensors: DiskTensors = {}
    layers = spec.layers
    for disk, ours in table.items():
        row = ours if isinstance(ours, TensorRule) else TensorRule((ours,))
        for layer in range(spec.n_layers) if "{n}" in disk else (0,):
            attn = layers[layer].attn
            if row.cross in (None, attn.cross):
                tensors |= _map_layer(disk, row, layer, shapes, attn.n_heads)
    covered = {part.name for tensor in tensors.values() for part in tensor.parts}
    return tensors if covered == shapes.keys() else None


def _map_layer(disk: str, row: TensorRule, layer: int, shapes: Mapping[str, Shape], n_heads: int) -> DiskTensors:
    """The disk tensors of a rule at one layer: a module's weight and bias, or a bare tensor, if the layer has them."""
    tensors: DiskTensors = {}
    names = [name.replace("{n}", str(layer)) for name in row.names]
    for suffix in ("", ".weight", ".bias"):
        if all(name + suffix in shapes for name in names):
            own = {name + suffix: shapes[name + suffix] for name in names}
            tensors |= _map_rule(disk.replace("{n}", str(layer)) + suffix, row, own, n_heads)
    return tensors


def _map_rule(disk: str, row: TensorRule, shapes: dict[str, Shape], n_heads: int) -> Iterator[tuple[str, DiskTensor]]:
    if "{e}" in disk:
        expert_shapes = {name: shape[1:] for name, shape in shapes.items()}
        for expert in range(next(iter(shapes.values()))[0]):
            yield disk.replace("{e}", str(expert)), _disk_tensor(row, expert_shapes, n_heads, expert)
    else:
        yield disk, _disk_tensor(row, shapes, n_heads, None)


def _disk_tensor(row: TensorRule, shapes: dict[str, Shape], n_heads: int, expert: int | None) -> DiskTensor:
    name, shape = next(iter(shapes.items()))
    is_vector = len(shape) == 1 or name.endswith("bias")
    transposed = row.transposed and not is_vector
    out = len(shape) - (1 if is_vector else 2)  # our output dimension
    axis = len(shape) - 1 if transposed else out
    groups = {None: 1, "per_head": n_heads, "per_row": shape[out]}[row.interleave]
    parts, total = [], 0
    for each, own in shapes.items():
        parts.append(TensorSlice(each, total, own[out] // groups))
        total += own[out] // groups
    joined = list(shape)
    joined[out] = groups * total
    if transposed:
        joined[-1], joined[-2] = joined[-2], joined[-1]
    return DiskTensor(tuple(joined), tuple(parts), groups, axis, transposed, expert)


@dataclass(frozen=True)
class Layout:
    """The naming of a loaded folder, so that saving writes the same names back."""

    family: str  # its first model_type
    table: int = 0
    prefix: str | None = None  # "": the files leave out the family's prefix
    stored_head: bool = False  # a tied head is stored all the same


WRAPPER_PREFIXES = ("language_model.", "model.language_model.")  # in old and new image-text folders


def naming_schemes(family: Family) -> Iterator[tuple[int, str | None, Callable[[str], str]]]:
    """Every naming that a folder of the family may use: table, prefix, and canonical name -> name on disk."""
    bare = re.compile("^" + re.escape(family.prefix))
    for index in range(len(family.tables)):
        yield index, None, lambda name: name
        if family.prefix:
            yield index, "", lambda name: bare.sub("", name)
        if family.wrappers:
            yield index, WRAPPER_PREFIXES[0], lambda name: WRAPPER_PREFIXES[0] + name
            yield index, WRAPPER_PREFIXES[1], lambda name: bare.sub(WRAPPER_PREFIXES[1], name)


def is_ignored(name: str, family: Family) -> bool:
    """Whether a tensor is a buffer that older versions stored, or belongs to the vision tower."""
    vision = ("vision_tower.", "vision_model.", "multi_modal_projector.")
    is_vision = bool(family.wrappers) and name.removeprefix("model.").startswith(vision)
    return is_vision or name.endswith(("rotary_emb.inv_freq", *family.buffers))


def prefix_names(prefix: str, rows: Mapping[str, str | TensorRule], ours: str = "blocks.{n}.") -> dict[str, Any]:
    """The rows of a layer with both sides prefixed."""

    def own(value: str | TensorRule) -> str | TensorRule:
        if isinstance(value, str):
            return ours + value
        return replace(value, names=tuple(ours + name for name in value.names))

    return {prefix + disk: own(value) for disk, value in rows.items()}


def expert_names(disk: str, names: Iterable[str] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, str]:
    """Rows for experts that are stored one by one."""
    ours = ("mlp.experts.gate", "mlp.experts.up", "mlp.experts.down")
    return {f"{disk}.{{e}}.{name}.weight": own for name, own in zip(names, ours, strict=True)}
