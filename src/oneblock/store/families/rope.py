"""Rotary settings of a config.json: the present `rope_parameters` and the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

from typing import Any

from oneblock.errors import OneblockError
from oneblock.spec import DynamicNTK, LinearScaling, Llama3Scaling, LongRope, Rope, RopeScaling, Yarn
from oneblock.spec.build import longrope_attention_factor, yarn_attention_factor
from oneblock.store.families.fields import Fields, Raw

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(
    f: Fields,
    head_dim: int,
    theta: float = 10_000.0,
    *,
    partial: float | None = None,
    interleaved: bool = False,
    theta_key: str = "rope_theta",
    partial_key: str = "partial_rotary_factor",
    types: tuple[str, ...] = TYPES,
) -> Rope:
    """The Rope of a class whose default base is `theta`. `partial`: its default part of each head; None: always all."""
    raw = f.raw.get("rope_scaling") or f.raw.get("rope_parameters") or {}
    if not isinstance(raw, dict):
        raise OneblockError(f"rope_parameters is {raw!r}, not an object; mend it")
    raw = {"rope_theta": f.raw.get(theta_key, theta), "partial_rotary_factor": f.raw.get(partial_key, partial), **raw}
    return rope_from(f, raw, head_dim, partial is not None, interleaved, types)


def rope_from(
    f: Fields, raw: Raw, head_dim: int, can_be_partial: bool, interleaved: bool = False, types: tuple[str, ...] = TYPES
) -> Rope:
    """One set of parameters, with base and part filled in."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in types:
        raise OneblockError(f"RoPE type {kind!r} is not supported; supported are {', '.join(types)}")
    part = raw.get("partial_rotary_factor")
    part = 1.0 if part is None else _number(raw, "partial_rotary_factor")
    if part != 1.0 and not can_be_partial:
        raise OneblockError(f"partial_rotary_factor {part} is not supported, as this class rotates whole heads")
    dim = int(head_dim * part)
    if dim % 2 or not 0 < dim <= head_dim:
        raise OneblockError(
            f"RoPE over {dim} of {head_dim} dimensions is not supported: it must be an even part; mend it"
        )
    scaling = _scaling(kind, f, raw, dim)
    return Rope(_number(raw, "rope_theta"), None if dim == head_dim else dim, interleaved, scaling)


def _scaling(kind: str, f: Fields, raw: Raw, dim: int) -> RopeScaling | None:
    longest = f.whole("max_position_embeddings")
    context = f.raw.get("original_max_position_embeddings", f.defaults.get("original_max_position_embeddings"))
    context = context or raw.get("original_max_position_embeddings") or longest
    if type(context) is not int or context < 1:
        raise OneblockError(f"original_max_position_embeddings is {context!r}, not a whole number above 0; mend it")
    match kind:
        case "linear":
            return LinearScaling(_number(raw, "factor"))
        case "dynamic":
            return DynamicNTK(_number(raw, "factor"), longest)
        case "llama3":
            low, high = _number(raw, "low_freq_factor"), _number(raw, "high_freq_factor")
            return Llama3Scaling(_number(raw, "factor"), low, high, context)
        case "yarn":
            return _yarn(raw, longest, context)
        case "longrope":
            return _longrope(raw, longest, context, dim)
    return None


def _yarn(raw: Raw, longest: int, context: int) -> Yarn:
    factor = longest / context if raw.get("factor") is None else _number(raw, "factor")
    if raw.get("attention_factor") is not None:
        gain = _number(raw, "attention_factor")
    elif raw.get("mscale") and raw.get("mscale_all_dim"):
        gain = yarn_attention_factor(factor, _number(raw, "mscale")) / yarn_attention_factor(
            factor, _number(raw, "mscale_all_dim")
        )
    else:
        gain = yarn_attention_factor(factor)
    beta_fast = _number(raw, "beta_fast") if raw.get("beta_fast") else 32.0
    beta_slow = _number(raw, "beta_slow") if raw.get("beta_slow") else 1.0
    return Yarn(factor, context, beta_fast, beta_slow, bool(raw.get("truncate", True)), gain)


def _longrope(raw: Raw, longest: int, context: int, dim: int) -> LongRope:
    def factors(key: str) -> tuple[float, ...]:
        value = raw.get(key)
        if not isinstance(value, list) or len(value) != dim // 2 or not all(isinstance(x, int | float) for x in value):
            raise OneblockError(f"{key} of longrope must be a list of {dim // 2} numbers; mend it")
        return tuple(float(x) for x in value)

    factor = longest / context if raw.get("factor") is None else _number(raw, "factor")
    given = raw.get("attention_factor") is not None
    gain = _number(raw, "attention_factor") if given else longrope_attention_factor(factor, context)
    return LongRope(factors("short_factor"), factors("long_factor"), context, gain)


def _number(raw: Raw, key: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OneblockError(f"{key} of RoPE is {value!r}, not a number; mend it")
    return float(value)


def write_rope(rope: Rope | None, head_dim: int) -> Raw:
    """`rope_parameters` that read back as this Rope. None, for layers without rotation, says nothing."""
    if rope is None:
        return {}
    raw: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.dim is not None:
        part = rope.dim / head_dim
        raw["partial_rotary_factor"] = part if int(head_dim * part) == rope.dim else (rope.dim + 0.5) / head_dim
    match rope.scaling:
        case LinearScaling(factor):
            raw |= {"rope_type": "linear", "factor": factor}
        case DynamicNTK(factor, _):  # its context is max_position_embeddings
            raw |= {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling(factor, low, high, context):
            raw |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            raw |= {"original_max_position_embeddings": context}
        case Yarn() as yarn:
            raw |= {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
            }
            raw |= {"truncate": yarn.truncate, "attention_factor": yarn.attention_factor}
            raw |= {"original_max_position_embeddings": yarn.original_context}
        case LongRope(short, long, context, gain):
            raw |= {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)}
            raw |= {"attention_factor": gain, "original_max_position_embeddings": context}
    return raw
