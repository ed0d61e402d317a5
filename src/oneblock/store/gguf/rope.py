"""Rotary settings of a file <-> those of config.json. Some are tensors: one divisor for each frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.model.rope import llama3
from oneblock.spec import DynamicNTK, LinearScaling, Llama3Scaling, LongRope, Rope, Spec, Yarn
from oneblock.spec.build import longrope_attention_factor, yarn_attention_factor
from oneblock.store.families.fields import full_attention
from oneblock.store.gguf.metadata import Metadata, brief, shortest
from oneblock.store.gguf.names import FREQS, LONG, SHORT, Arch

Raw = dict[str, Any]
BASE, DIM, WINDOWED_BASE = "rope.freq_base", "rope.dimension_count", "rope.freq_base_swa"
KIND, FACTOR, BEFORE = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
GAIN, FAST, SLOW = "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
# Llama 3's four numbers, of which a file holds what they lead to; without this of ours, the published ones are tried.
OURS = "rope.scaling.llama3"
PUBLISHED = (1.0, 4.0, 8192.0)  # low, high, context


def read(said: Metadata, arch: Arch, raw: Raw, factors: Mapping[str, Tensor]) -> Raw:
    """`rope_parameters`, and what belongs to them."""
    width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    dim = said.whole(DIM) if said.get(DIM) is not None else width
    found: Raw = {"rope_theta": said.number(BASE, 10_000.0), **_scaling(said)}
    more: Raw = {}
    if arch.model_type == "phi3":
        found["partial_rotary_factor"] = dim / width if int(width * (dim / width)) == dim else (dim + 0.5) / width
        if LONG in factors and SHORT in factors:
            found, more = _longrope(said, raw, found, factors)
    elif dim != width:
        raise OneblockError(f"rotates {dim} of {width} dimensions, which a model of {arch.model_type} does not")
    elif FREQS in factors:
        found |= _divided(said, found["rope_theta"], dim, factors[FREQS])
    if arch.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": said.number(WINDOWED_BASE, 10_000.0)}
        found = {"full_attention": found, "sliding_attention": local}
    return {"rope_parameters": found, **more}


def _scaling(said: Metadata) -> Raw:
    kind = said.get(KIND) or ("linear" if said.get(FACTOR) is not None else "none")
    match kind:
        case "none" | "longrope":  # the latter is in its tensors
            return {"rope_type": "default"}
        case "linear":
            return {"rope_type": "linear", "factor": said.number(FACTOR)}
        case "yarn":
            found: Raw = {"rope_type": "yarn", "factor": said.number(FACTOR)}
            found |= {"beta_fast": said.number(FAST, 32.0), "beta_slow": said.number(SLOW, 1.0)}
            return found | {"original_max_position_embeddings": said.whole(BEFORE)}
    raise OneblockError(f"{said.arch}.{KIND} {brief(kind)} is not known; known are none, linear, yarn, longrope")


def _longrope(said: Metadata, raw: Raw, found: Raw, factors: Mapping[str, Tensor]) -> tuple[Raw, Raw]:
    before, longest = said.whole(BEFORE), raw["max_position_embeddings"]
    found |= {"rope_type": "longrope", "short_factor": _decimals(factors[SHORT])}
    found |= {"long_factor": _decimals(factors[LONG])}
    gain, usual = said.number(GAIN, 1.0), longrope_attention_factor(longest / before, before) if before > 1 else 1.0
    if not math.isclose(gain, usual, rel_tol=1e-6):  # as long as it is the usual one, with all its digits
        found["attention_factor"] = gain
    return found, {"original_max_position_embeddings": before}


def _divided(said: Metadata, theta: float, dim: int, divisors: Tensor) -> Raw:
    """Llama 3's scaling where the divisors are those that it makes; else LongRoPE, which takes any."""
    own = said.get(OURS)
    known = isinstance(own, np.ndarray | list) and len(own) == 4
    numbers = [shortest(x) for x in own] if known else [float(divisors.max()), *PUBLISHED]
    factor, low, high, context = numbers
    if all(math.isfinite(x) and 0 < x < 1 << 24 for x in numbers) and theta > 0:
        expected = divisors_of(theta, dim, Llama3Scaling(factor, low, high, int(context)))
        if expected.shape == divisors.shape and torch.allclose(expected, divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(context),
            }
    both = _decimals(divisors)
    return {"rope_type": "longrope", "short_factor": both, "long_factor": both, "attention_factor": 1.0}


def divisors_of(theta: float, dim: int, scaling: Llama3Scaling) -> Tensor:
    """What each frequency is divided by: (dim / 2,)."""
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return freqs / llama3(
        freqs, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context
    )


def _decimals(divisors: Tensor) -> list[float]:
    return [shortest(x) for x in divisors.tolist()]


# ------------------------------------------------------------------ writing


def write(spec: Spec) -> tuple[Raw, dict[str, Tensor]]:
    """Settings and tensors of a model's rotation."""
    attn = full_attention(spec)
    if attn.rope is None:
        return {}, {}
    dim = attn.rope.dim or attn.head_dim
    more, factors = _written(attn.rope, dim)
    local = next((layer.attn.rope for layer in spec.layers if layer.attn.window), None)
    if local is not None and local != attn.rope:
        more[WINDOWED_BASE] = local.theta
    return {BASE: attn.rope.theta, DIM: dim, **more}, factors


def _written(rope: Rope, dim: int) -> tuple[Raw, dict[str, Tensor]]:
    match rope.scaling:
        case LinearScaling(factor):
            return {KIND: "linear", FACTOR: factor}, {}
        case Yarn() as yarn if yarn.truncate and math.isclose(
            yarn.attention_factor, yarn_attention_factor(yarn.factor)
        ):
            more = {KIND: "yarn", FACTOR: yarn.factor, BEFORE: yarn.original_context}
            return more | (
                {FAST: yarn.beta_fast, SLOW: yarn.beta_slow} if (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0) else {}
            ), {}
        case Llama3Scaling() as scaling:
            numbers = [
                scaling.factor,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                float(scaling.original_context),
            ]
            return {OURS: numbers}, {FREQS: divisors_of(rope.theta, dim, scaling)}
        case LongRope(short, long, _, gain) if short == long and gain == 1.0:
            return {}, {FREQS: torch.tensor(short)}
        case LongRope(short, long, context, gain):
            return {BEFORE: context, GAIN: gain}, {LONG: torch.tensor(long), SHORT: torch.tensor(short)}
        case Yarn() | DynamicNTK():
            name = type(rope.scaling).__name__
            raise OneblockError(f"GGUF has no place for this {name} scaling of RoPE: this model cannot be exported")
    return {}, {}
