"""RoPE metadata of a GGUF file <-> rope_parameters of config.json. Some of it is tensors: a divisor per frequency."""

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
from oneblock.store.gguf.architectures import FREQS, LONG, SHORT, Architecture
from oneblock.store.gguf.metadata import Metadata, shorten, shortest_decimal

Raw = dict[str, Any]
BASE, DIM, SLIDING_BASE = "rope.freq_base", "rope.dimension_count", "rope.freq_base_swa"
KIND, FACTOR, ORIGINAL = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
ATTN_FACTOR = "rope.scaling.attn_factor"
BETA_FAST, BETA_SLOW = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
# GGUF stores the divisors that Llama 3's scaling leads to, not its four numbers. This key of ours has them (factor,
# low_freq_factor, high_freq_factor, original context); in files without it, the published numbers are tried.
LLAMA3 = "rope.scaling.llama3"
PUBLISHED = (1.0, 4.0, 8192.0)  # all but the factor


def read_rope(metadata: Metadata, arch: Architecture, raw: Raw, divisors: Mapping[str, Tensor]) -> Raw:
    """`rope_parameters`, and the other keys of config.json that depend on the scaling."""
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    dim = metadata.read_int(DIM) if metadata.get(DIM) is not None else head_dim
    rope: Raw = {"rope_theta": metadata.read_float(BASE, 10_000.0), **_read_scaling(metadata)}
    config: Raw = {}
    if arch.model_type == "phi3":
        part = dim / head_dim
        rope["partial_rotary_factor"] = part if int(head_dim * part) == dim else (dim + 0.5) / head_dim
        if LONG in divisors and SHORT in divisors:
            rope |= _read_longrope(metadata, raw, divisors)
            config["original_max_position_embeddings"] = metadata.read_int(ORIGINAL)
    elif dim != head_dim:
        raise OneblockError(f"rotates {dim} of {head_dim} dimensions, which a model of {arch.model_type} does not")
    elif FREQS in divisors:
        rope |= _read_divisors(metadata, rope["rope_theta"], dim, divisors[FREQS])
    if arch.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": metadata.read_float(SLIDING_BASE, 10_000.0)}
        rope = {"full_attention": rope, "sliding_attention": local}
    return {"rope_parameters": rope, **config}


def _read_scaling(metadata: Metadata) -> Raw:
    kind = metadata.get(KIND) or ("linear" if metadata.get(FACTOR) is not None else "none")
    match kind:
        case "none" | "longrope":  # LongRoPE is in its tensors
            return {"rope_type": "default"}
        case "linear":
            return {"rope_type": "linear", "factor": metadata.read_float(FACTOR)}
        case "yarn":
            rope: Raw = {"rope_type": "yarn", "factor": metadata.read_float(FACTOR)}
            rope |= {"beta_fast": metadata.read_float(BETA_FAST, 32.0)}
            rope |= {"beta_slow": metadata.read_float(BETA_SLOW, 1.0)}
            return rope | {"original_max_position_embeddings": metadata.read_int(ORIGINAL)}
    raise OneblockError(f"{metadata.arch}.{KIND} {shorten(kind)} is not supported; use none, linear, yarn or longrope")


def _read_longrope(metadata: Metadata, raw: Raw, divisors: Mapping[str, Tensor]) -> Raw:
    original, context = metadata.read_int(ORIGINAL), raw["max_position_embeddings"]
    rope: Raw = {"rope_type": "longrope", "short_factor": _decimals(divisors[SHORT])}
    rope |= {"long_factor": _decimals(divisors[LONG])}
    factor = metadata.read_float(ATTN_FACTOR, 1.0)
    default = longrope_attention_factor(context / original, original) if original > 1 else 1.0
    # fp32 has lost digits of the default, which is left to the class
    return rope if math.isclose(factor, default, rel_tol=1e-6) else rope | {"attention_factor": factor}


def _read_divisors(metadata: Metadata, theta: float, dim: int, divisors: Tensor) -> Raw:
    """Llama 3's scaling if it leads to these divisors; else LongRoPE, which takes any."""
    stored = metadata.get(LLAMA3)
    is_stored = isinstance(stored, np.ndarray | list) and len(stored) == 4
    numbers = [shortest_decimal(x) for x in stored] if is_stored else [float(divisors.max()), *PUBLISHED]
    factor, low, high, context = numbers
    if all(math.isfinite(x) and 0 < x < 1 << 24 for x in numbers) and theta > 0:
        expected = llama3_divisors(theta, dim, Llama3Scaling(factor, low, high, int(context)))
        if expected.shape == divisors.shape and torch.allclose(expected, divisors, rtol=1e-4):
            rope: Raw = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return rope | {"original_max_position_embeddings": int(context)}
    both = _decimals(divisors)
    return {"rope_type": "longrope", "short_factor": both, "long_factor": both, "attention_factor": 1.0}


def llama3_divisors(theta: float, dim: int, scaling: Llama3Scaling) -> Tensor:
    """The divisor of each frequency, (dim / 2,)."""
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return freqs / llama3(freqs, scaling.factor, low, high, scaling.original_context)


def _decimals(divisors: Tensor) -> list[float]:
    return [shortest_decimal(x) for x in divisors.tolist()]


# ------------------------------------------------------------------ writing


def write_rope(spec: Spec) -> tuple[Raw, dict[str, Tensor]]:
    """Metadata and divisors of a model's RoPE."""
    attn = full_attention(spec)
    if attn.rope is None:
        return {}, {}
    dim = attn.rope.dim or attn.head_dim
    values, divisors = _write_scaling(attn.rope, dim)
    local = next((layer.attn.rope for layer in spec.layers if layer.attn.window), None)
    if local is not None and local != attn.rope:
        values[SLIDING_BASE] = local.theta
    return {BASE: attn.rope.theta, DIM: dim, **values}, divisors


def _write_scaling(rope: Rope, dim: int) -> tuple[Raw, dict[str, Tensor]]:
    match rope.scaling:
        case None:
            return {}, {}
        case LinearScaling(factor):
            return {KIND: "linear", FACTOR: factor}, {}
        case Yarn(factor, original, fast, slow, True, gain) if math.isclose(gain, yarn_attention_factor(factor)):
            betas = {} if (fast, slow) == (32.0, 1.0) else {BETA_FAST: fast, BETA_SLOW: slow}
            return {KIND: "yarn", FACTOR: factor, ORIGINAL: original, **betas}, {}
        case Llama3Scaling(factor, low, high, original) as scaling:
            return {LLAMA3: [factor, low, high, float(original)]}, {FREQS: llama3_divisors(rope.theta, dim, scaling)}
        case LongRope(short, long, _, gain) if short == long and gain == 1.0:
            return {}, {FREQS: torch.tensor(short)}
        case LongRope(short, long, original, gain):
            return {ORIGINAL: original, ATTN_FACTOR: gain}, {LONG: torch.tensor(long), SHORT: torch.tensor(short)}
        case Yarn() | DynamicNTK():
            name = type(rope.scaling).__name__
            raise OneblockError(f"GGUF cannot express this {name} scaling of RoPE; this model cannot be exported")
