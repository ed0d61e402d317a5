"""How a family names and lays out its tensors on disk, as data; and the table of one model's files made from it.

Shapes: a disk tensor may hold several of ours (fused rows, interleaved columns), be stored (in, out), or be one
expert of a stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from oneblock.spec import Spec

Shape = tuple[int, ...]
Groups = Literal["one", "heads", "each"]  # q k v; head by head q k v q k v (GPT-NeoX); or gate up gate up


@dataclass(frozen=True)
class Stored:
    """One disk tensor made of one or more of ours, joined along their output dimension."""

    names: tuple[str, ...]
    transposed: bool = False  # weights are stored (in, out): Conv1D, and the expert stacks of Llama 4 and gpt-oss
    groups: Groups = "one"
    cross: bool | None = None  # only in layers that read the image, or only in the others


def stored(*names: str, transposed: bool = False, groups: Groups = "one", cross: bool | None = None) -> Stored:
    return Stored(names, transposed, groups, cross)


Table = Mapping[str, str | Stored]  # disk module or tensor -> ours; {n} the layer, {e} the expert


@dataclass(frozen=True)
class Family:
    """A Hugging Face class: its configuration both ways, and its names."""

    types: tuple[str, ...]  # the model_type values it reads; it writes the first
    architecture: str
    read: Callable[[dict[str, Any]], Spec]
    write: Callable[[Spec], dict[str, Any]]
    tables: tuple[Table, ...]  # how it is saved now, then older or other ways
    prefix: str = "model."  # what the files of a model without its head leave out
    buffers: tuple[str, ...] = ()  # endings of stored tensors that are no weights
    wrappers: tuple[str, ...] = ()  # model_type values of image-text models that hold this one as text_config


@dataclass(frozen=True)
class Part:
    """Where one of our tensors lies in a disk tensor: `start` and `size` within each group of the joined dimension."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Slot:
    """One disk tensor: its shape and the parts it holds."""

    shape: Shape
    parts: tuple[Part, ...]
    groups: int = 1
    axis: int = 0  # the joined dimension, as stored
    transposed: bool = False
    expert: int | None = None  # it is this row of our stack


Slots = dict[str, Slot]


def slots(table: Table, spec: Spec, shapes: Mapping[str, Shape]) -> Slots | None:
    """Every disk tensor of a model whose parameters have these shapes; None where the table leaves one out."""
    found: Slots = {}
    layers = spec.layers
    for disk, ours in table.items():
        rule = ours if isinstance(ours, Stored) else Stored((ours,))
        for layer in range(spec.n_layers) if "{n}" in disk else (0,):
            attn = layers[layer].attn
            if rule.cross in (None, attn.cross):
                found |= _layer_slots(disk, rule, layer, shapes, attn.n_heads)
    covered = {part.name for slot in found.values() for part in slot.parts}
    return found if covered == shapes.keys() else None


def _layer_slots(disk: str, rule: Stored, layer: int, shapes: Mapping[str, Shape], heads: int) -> Slots:
    """A rule at one layer: a module's weight and bias, or a bare tensor; nothing where the layer has none of it."""
    found: Slots = {}
    names = [name.replace("{n}", str(layer)) for name in rule.names]
    for suffix in ("", ".weight", ".bias"):
        if all(name + suffix in shapes for name in names):
            full = {name + suffix: shapes[name + suffix] for name in names}
            found |= _rule_slots(disk.replace("{n}", str(layer)) + suffix, rule, full, heads)
    return found


def _rule_slots(disk: str, rule: Stored, shapes: dict[str, Shape], heads: int) -> Iterator[tuple[str, Slot]]:
    first = next(iter(shapes))
    if "{e}" in disk:
        experts = shapes[first][0]
        for expert in range(experts):
            inner = {name: shape[1:] for name, shape in shapes.items()}
            yield disk.replace("{e}", str(expert)), _slot(rule, inner, heads, expert)
    else:
        yield disk, _slot(rule, shapes, heads, None)


def _slot(rule: Stored, shapes: dict[str, Shape], heads: int, expert: int | None) -> Slot:
    first, shape = next(iter(shapes.items()))
    vector = len(shape) == 1 or first.endswith("bias")
    transposed = rule.transposed and not vector
    out = len(shape) - (1 if vector else 2)  # our output dimension
    axis = len(shape) - 1 if transposed else out
    groups = {"one": 1, "heads": heads, "each": shape[out]}[rule.groups]
    parts, total = [], 0
    for name, own in shapes.items():
        parts.append(Part(name, total, own[out] // groups))
        total += own[out] // groups
    joined = list(shape)
    joined[out] = groups * total
    if transposed:
        joined[-1], joined[-2] = joined[-2], joined[-1]
    return Slot(tuple(joined), tuple(parts), groups, axis, transposed, expert)


@dataclass(frozen=True)
class Layout:
    """What was particular about a folder's names, so that saving can give the same ones back."""

    family: str  # its first model_type
    table: int = 0
    prefix: str | None = None  # "": the files leave the family's prefix out
    stored_head: bool = False  # a tied head was stored all the same


WRAPPED = ("language_model.", "model.language_model.")  # in old and new image-text folders


def disk_names(family: Family) -> Iterator[tuple[int, str | None, Callable[[str], str]]]:
    """Every way a folder of the family may name its tensors: table, prefix, and canonical name -> name there."""
    prefix = family.prefix
    bare = re.compile("^" + re.escape(prefix))
    for index in range(len(family.tables)):
        yield index, None, lambda name: name
        if prefix:
            yield index, "", lambda name: bare.sub("", name)
        if family.wrappers:
            yield index, WRAPPED[0], lambda name: WRAPPED[0] + name
            yield index, WRAPPED[1], lambda name: bare.sub(WRAPPED[1], name)


def ignorable(name: str, family: Family) -> bool:
    """Buffers that older versions stored, and the image side of image-text models."""
    sights = ("vision_tower.", "vision_model.", "multi_modal_projector.")
    image = bool(family.wrappers) and name.removeprefix("model.").startswith(sights)
    return image or name.endswith(("rotary_emb.inv_freq", *family.buffers))


def named(prefix: str, pairs: Mapping[str, str | Stored], ours: str = "blocks.{n}.") -> dict[str, str | Stored]:
    """A table with both sides of each row prefixed, for the rows of a layer."""

    def own(value: str | Stored) -> str | Stored:
        if isinstance(value, str):
            return ours + value
        return replace(value, names=tuple(ours + name for name in value.names))

    return {prefix + disk: own(value) for disk, value in pairs.items()}


def experts(disk: str, names: Iterable[str] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, str]:
    """Rows for experts that are stored one by one."""
    return {
        f"{disk}.{{e}}.{name}.weight": f"mlp.experts.{own}"
        for name, own in zip(names, ("gate", "up", "down"), strict=True)
    }
