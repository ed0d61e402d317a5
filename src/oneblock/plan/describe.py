"""An architecture in plain words, and two of them field by field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from oneblock.spec import (
    Attention,
    DynamicNTK,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Mlp,
    Moe,
    Norm,
    Rope,
    Spec,
    Yarn,
)

ACTS = {
    "gelu": "GELU",
    "gelu_tanh": "GELU (tanh form)",
    "quick_gelu": "GELU (sigmoid form)",
    "silu": "SiLU",
    "relu": "ReLU",
    "relu2": "squared ReLU",
}

GATED = {
    "silu": "SwiGLU",
    "gelu_tanh": "GeGLU (tanh form)",
    "gelu": "GeGLU",
    "relu": "ReGLU",
    "quick_gelu": "SwiGLU (1.702 in the sigmoid)",
}

RESIDUALS = {
    "pre": "a norm before each branch",
    "post": "a norm after each sum",
    "sandwich": "norms before and after each branch",
    "output": "a norm after each branch, before the sum",
    "parallel": "attention and MLP side by side, one norm before both",
    "parallel_two": "attention and MLP side by side, a norm before each",
}


@dataclass(frozen=True)
class Change:
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.what}: {self.before} -> {self.after}"


def diff(a: Spec, b: Spec) -> list[Change]:
    """What differs from `a` to `b`, in the order of a forward pass; empty only where a == b."""
    before, after = describe(a), describe(b)
    changes = [Change(what, before[what], after[what]) for what in before if before[what] != after[what]]
    if not changes and a != b:  # words leave out long lists of numbers
        paths = list(_differences(a, b, ""))
        changes = [Change(path, str(x), str(y)) for path, x, y in paths]
    return changes


def describe(spec: Spec) -> dict[str, str]:
    """The architecture in words, aspect by aspect."""
    return {
        "width": f"{spec.dim:,}",
        "depth": f"{spec.n_layers} layers",
        "vocabulary": f"{spec.vocab:,} tokens",
        "context": f"{spec.context:,} tokens",
        "embedding": _embedding(spec),
        "positions": _positions(spec),
        "norm": _norm(spec.norm),
        "residual": by_layer(spec, _residual),
        "heads": by_layer(spec, lambda x: _heads(x.attn)),
        "attention": by_layer(spec, lambda x: _sight(x.attn)),
        "q and k": by_layer(spec, lambda x: _queries(x.attn)),
        "attention biases": by_layer(spec, lambda x: _biases(x.attn)),
        "MLP": by_layer(spec, lambda x: _mlp(x.mlp) if isinstance(x.mlp, Mlp) else _moe(x.mlp)),
        "final norm": "yes" if spec.final_norm else "none",
        "head": _head(spec),
    }


def by_layer(spec: Spec, words: Callable[[Layer], str]) -> str:
    """One phrase where all layers agree, otherwise each phrase with the layers it is true of (counted from 1)."""
    phrases = [words(x) for x in spec.layers]
    if len(set(phrases)) <= 1:
        return phrases[0] if phrases else "none"
    period = next(n for n in range(1, len(phrases) + 1) if all(p == phrases[i % n] for i, p in enumerate(phrases)))
    where: dict[str, list[int]] = {}
    for i, phrase in enumerate(phrases[:period]):
        where.setdefault(phrase, []).append(i + 1)
    of = f" of every {period}" if period < len(phrases) else ""
    return "; ".join(f"{phrase} (layer{'s' * (len(at) > 1)} {_runs(at)}{of})" for phrase, at in where.items())


def _runs(numbers: list[int]) -> str:
    """1, 2, 3, 6 -> "1-3, 6"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _list(*phrases: str | None, nothing: str = "none") -> str:
    return ", ".join(p for p in phrases if p) or nothing


def _number(x: float) -> str:
    """1e-05 -> 1e-5, 500000.0 -> 500,000."""
    return f"{x:,.10g}".replace("e-0", "e-")


def _embedding(spec: Spec) -> str:
    scaled = "" if spec.embed_scale == 1 else f", times {spec.embed_scale:.6g}"
    extra = f", {spec.embed_extra} more input rows" if spec.embed_extra else ""
    return f"a table{scaled}{extra}"


def _positions(spec: Spec) -> str:
    turning = by_layer(spec, lambda x: _rope(x.attn.rope))
    if spec.positions is None:
        return turning
    at = f", from row {spec.positions.offset}" if spec.positions.offset else ""
    words = f"{spec.positions.kind} positions ({spec.positions.length:,}{at})"
    return words if turning == "none" else f"{words} and {turning}"


def _rope(rope: Rope | None) -> str:
    if rope is None:
        return "none"
    return _list(
        f"rotary, base {_number(rope.theta)}",
        f"{rope.dim} dimensions of each head" if rope.dim else None,
        "neighbours paired" if rope.interleaved else None,
        _scaling(rope),
    )


def _scaling(rope: Rope) -> str | None:
    match rope.scaling:
        case None:
            return None
        case LinearScaling(factor):
            return f"positions divided by {factor:g}"
        case DynamicNTK(factor, context):
            return f"base growing past {context:,} tokens (factor {factor:g})"
        case Llama3Scaling(factor, low, high, context):
            ends = sorted({context / high, context / low})
            return f"waves over {' .. '.join(map(_number, ends))} tokens stretched by {factor:g}"
        case Yarn():
            return _yarn(rope.scaling)
        case LongRope(short, long, context, gain):
            return f"LongRoPE past {context:,} tokens ({len(short)} and {len(long)} divisors, gain {gain:.5g})"


def _yarn(y: Yarn) -> str:
    ends = "" if y.truncate else ", ends not rounded"
    beta = f"{y.beta_fast:g} .. {y.beta_slow:g}{ends}"
    return f"YaRN by {y.factor:g} past {y.original_context:,} tokens (ramp {beta}, gain {y.attention_factor:.5g})"


def _norm(n: Norm) -> str:
    return _list(
        f"{'LayerNorm' if n.kind == 'layer' else 'RMSNorm'}{' with bias' if n.bias else ''}",
        f"eps {_number(n.eps)}",
        f"gain stored less {n.weight_offset:g}" if n.weight_offset else None,
        "gain applied in fp32" if n.scale_in_fp32 else None,
    )


def _residual(x: Layer) -> str:
    return RESIDUALS[x.residual] + (", each branch behind a tanh gate" if x.gated else "")


def _heads(a: Attention) -> str:
    if a.n_kv_heads == a.n_heads:
        return f"{a.n_heads} heads of {a.head_dim}, each with its own keys and values"
    heads = "1 KV head" if a.n_kv_heads == 1 else f"{a.n_kv_heads} KV heads"
    return f"{a.n_heads} query heads of {a.head_dim} sharing {heads}"


def _sight(a: Attention) -> str:
    if a.cross:
        return "over an image"
    if a.window is None and a.chunk is None:
        return "over the whole text"
    window = f"a window of {a.window:,} tokens" if a.window else None
    return "over " + _list(window, f"chunks of {a.chunk:,} tokens" if a.chunk else None)


def _queries(a: Attention) -> str:
    norms = {"head": "normed per head", "full": "normed whole", "l2": "normed after the rotation, without gain"}
    return _list(
        norms.get(a.qk_norm or ""),
        f"scores times {a.scale:.6g}" if a.scale is not None else None,  # otherwise 1 / sqrt(head_dim)
        f"scores capped at {a.softcap:g}" if a.softcap is not None else None,
        f"queries tempered every {_number(a.temperature_tuning[0])} tokens by {a.temperature_tuning[1]:g}"
        if a.temperature_tuning
        else None,
        "a sink per head" if a.sinks else None,
        nothing="plain",
    )


def _biases(a: Attention) -> str:
    return {
        (False, False): "none",
        (True, False): "on q, k, v",
        (False, True): "on the output",
        (True, True): "on q, k, v and the output",
    }[a.bias]


def _mlp(m: Mlp) -> str:
    if m.gated:
        kind = GATED.get(m.act, f"gated by {ACTS.get(m.act, m.act)}") + f" of {m.hidden_dim:,}"
    else:
        kind = f"{m.hidden_dim:,} wide, {ACTS.get(m.act, m.act)}"
    return _list(
        kind,
        "with biases" if m.bias else None,
        f"clamped at {m.clamp:g}" if m.clamp is not None else None,
        f"up + {m.up_offset:g}" if m.up_offset else None,
    )


def _moe(m: Moe) -> str:
    gate = " behind a gate" if m.shared_gate else ""
    return _list(
        f"{m.top_k} of {m.n_experts} experts ({_mlp(m.expert)})",
        f"{m.score_func} router{' with bias' if m.router_bias else ''}",
        "weights made to sum to 1" if m.renormalize else None,
        "inputs weighed, not outputs" if m.scale_expert_input else None,
        f"one shared{gate} ({_mlp(m.shared)})" if m.shared else None,
    )


def _head(spec: Spec) -> str:
    return _list(
        "the embedding again" if spec.tied else "its own matrix",
        "with bias" if spec.head_bias else None,
        f"logits times {spec.logit_scale:g}" if spec.logit_scale != 1 else None,
        f"logits capped at {spec.logit_softcap:g}" if spec.logit_softcap is not None else None,
    )


def _differences(a: Any, b: Any, path: str) -> list[tuple[str, Any, Any]]:
    """Every place where two trees differ: `pattern[0].attn.rope.scaling.short_factor[3]`."""
    if a == b:
        return []
    if is_dataclass(a) and type(a) is type(b):
        names = [f.name for f in fields(a)]
        found = [_differences(getattr(a, n), getattr(b, n), f"{path}.{n}".lstrip(".")) for n in names]
        return [x for each in found for x in each]
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return [x for i, (x1, x2) in enumerate(zip(a, b, strict=True)) for x in _differences(x1, x2, f"{path}[{i}]")]
    return [(path, a, b)]
