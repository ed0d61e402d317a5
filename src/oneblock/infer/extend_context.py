"""Texts longer than a model was made for: RoPE scaling switched on at loading."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.spec import parts as s

Kind = Literal["yarn", "linear", "dynamic"]


def extend_context(model: Decoder, context: int, kind: Kind = "yarn") -> None:
    """In place: positions up to `context` fit into the angles the model knows.

    Layers with a window that its first context holds keep theirs: they never look further. YaRN (arXiv:2309.00071)
    loses least; linear is position interpolation (arXiv:2306.15595); dynamic leaves texts up to the old context as they
    were. OneblockError where positions are learned, scaled already, or long enough.
    """
    old = model.spec
    if old.positions is not None:
        raise OneblockError(f"its {old.positions.length} positions are a table: no scaling makes it longer")
    if context <= old.context:
        raise OneblockError(f"--context {context} is no longer than the model's own {old.context}: leave it out")
    new = replace(
        old, context=context, pattern=tuple(longer(layer, old.context, context, kind) for layer in old.pattern)
    )
    model.spec = new
    for block, layer in zip(cast(Any, model.blocks), new.layers, strict=True):
        block.attn.spec = layer.attn


def longer(layer: s.Layer, before: int, after: int, kind: Kind) -> s.Layer:
    attn, rope = layer.attn, layer.attn.rope
    near = attn.window or attn.chunk
    if rope is None or (near is not None and near <= before):
        return layer
    if rope.scaling is not None:
        name = type(rope.scaling).__name__
        raise OneblockError(f"its positions are scaled already ({name}): --rope-scaling cannot scale them again")
    return replace(layer, attn=replace(attn, rope=replace(rope, scaling=scaling(after / before, before, kind))))


def scaling(factor: float, before: int, kind: Kind) -> s.RopeScaling:
    match kind:
        case "linear":
            return s.LinearScaling(factor)
        case "dynamic":
            return s.DynamicNTK(factor, before)
        case "yarn":
            return s.Yarn(factor, before, attention_factor=0.1 * math.log(factor) + 1)
