"""RoPE scaling applied to a loaded model, for sequences beyond its training context."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from oneblock.config import check_range
from oneblock.errors import OneblockError
from oneblock.infer.options import CONTEXT
from oneblock.model import Decoder
from oneblock.spec import parts as s

ScalingMethod = Literal["yarn", "linear", "dynamic"]


def extend_context(model: Decoder, context: int, method: ScalingMethod = "yarn") -> None:
    """Scale the RoPE of a model in place so that positions up to `context` stay within the angles it was trained on.

    YaRN (arXiv:2309.00071) loses the least; linear is position interpolation (arXiv:2306.15595); dynamic NTK scaling
    changes nothing up to the original context. Layers whose window fits the original context are left as they are.
    OneblockError for learned positions, RoPE that is already scaled, and contexts that are not longer.
    """
    old = model.spec
    check_range("context", context, CONTEXT, int)
    if method not in get_args(ScalingMethod):
        raise OneblockError(f"rope_scaling is {method!r}, but it must be {', '.join(get_args(ScalingMethod))}")
    if old.positions is not None:
        raise OneblockError(f"the model has {old.positions.length} learned positions: RoPE scaling does not apply")
    if context <= old.context:
        raise OneblockError(f"context {context} is not longer than the model's own {old.context}: leave --context out")
    layers = tuple(scale_layer(layer, old.context, context, method) for layer in old.pattern)
    model.spec = replace(old, context=context, pattern=layers)
    for block, layer in zip(cast(Any, model.blocks), model.spec.layers, strict=True):
        block.attn.spec = layer.attn


def scale_layer(layer: s.Layer, old_context: int, new_context: int, method: ScalingMethod) -> s.Layer:
    """The layer with scaled RoPE; the same layer where a window keeps it within the old context."""
    attn, rope = layer.attn, layer.attn.rope
    window = attn.window or attn.chunk
    if rope is None or (window is not None and window <= old_context):
        return layer
    if rope.scaling is not None:
        name = type(rope.scaling).__name__
        raise OneblockError(f"the model's RoPE already has {name} scaling: --rope-scaling cannot scale it again")
    scaling = build_scaling(new_context / old_context, old_context, method)
    return replace(layer, attn=replace(attn, rope=replace(rope, scaling=scaling)))


def build_scaling(factor: float, old_context: int, method: ScalingMethod) -> s.RopeScaling:
    match method:
        case "linear":
            return s.LinearScaling(factor)
        case "dynamic":
            return s.DynamicNTK(factor, old_context)
        case "yarn":
            return s.Yarn(factor, old_context, attention_factor=0.1 * math.log(factor) + 1)
