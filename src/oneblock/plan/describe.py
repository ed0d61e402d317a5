"""Describe an architecture in the field's terms, and how two of them differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from oneblock import spec as s

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
    "pre": "pre-norm",
    "post": "post-norm",
    "sandwich": "norms before and after each sublayer",
    "output": "a norm on each sublayer's output",
    "parallel": "parallel attention and MLP, one shared pre-norm",
    "parallel_two": "parallel attention and MLP, a pre-norm each",
}


@dataclass(frozen=True)
class Change:
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.what}: {self.before} -> {self.after}"


def diff(a: s.Spec, b: s.Spec) -> list[Change]:
    """The differences from `a` to `b`, in the order of a forward pass; empty only where a == b."""
    before, after = describe(a), describe(b)
    changes = [Change(what, before[what], after[what]) for what in before if before[what] != after[what]]
    if not changes and a != b:  # descriptions leave out long lists of numbers
        paths = list(_differences(a, b, ""))
        changes = [Change(path, str(x), str(y)) for path, x, y in paths]
    return changes


def describe(spec: s.Spec) -> dict[str, str]:
    """The architecture, one description per aspect."""
    return {
        "dim": f"{spec.dim:,}",
        "layers": f"{spec.n_layers}",
        "vocabulary": f"{spec.vocab:,} tokens",
        "context": f"{spec.context:,} tokens",
        "embedding": _embedding(spec),
        "positions": _positions(spec),
        "norm": _norm(spec.norm),
        "residual": by_layer(spec, _residual),
        "heads": by_layer(spec, lambda x: _heads(x.attn)),
        "attention": by_layer(spec, lambda x: _attention(x.attn)),
        "scores": by_layer(spec, lambda x: _scores(x.attn)),
        "attention biases": by_layer(spec, lambda x: _biases(x.attn)),
        "MLP": by_layer(spec, lambda x: _mlp(x.mlp) if isinstance(x.mlp, s.Mlp) else _moe(x.mlp)),
        "final norm": "yes" if spec.final_norm else "none",
        "LM head": _head(spec),
    }


def by_layer(spec: s.Spec, words: Callable[[s.Layer], str]) -> str:
    """One phrase if all layers agree, otherwise each phrase with its layers (counted from 1)."""
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


def _embedding(spec: s.Spec) -> str:
    scaled = "" if spec.embed_scale == 1 else f", times {spec.embed_scale:.6g}"
    extra = f", {spec.embed_extra} more input rows" if spec.embed_extra else ""
    return f"token embedding{scaled}{extra}"


def _positions(spec: s.Spec) -> str:
    rotary = by_layer(spec, lambda x: _rope(x.attn.rope))
    if spec.positions is None:
        return rotary
    at = f", from row {spec.positions.offset}" if spec.positions.offset else ""
    words = f"{spec.positions.kind} positions ({spec.positions.length:,}{at})"
    return words if rotary == "none" else f"{words} and {rotary}"


def _rope(rope: s.Rope | None) -> str:
    if rope is None:
        return "none"
    return _list(
        f"RoPE, theta {_number(rope.theta)}",
        f"on {rope.dim} dimensions per head" if rope.dim else None,
        "interleaved pairs" if rope.interleaved else None,
        _scaling(rope),
    )


def _scaling(rope: s.Rope) -> str | None:
    match rope.scaling:
        case None:
            return None
        case s.LinearScaling(factor):
            return f"linear scaling by {factor:g}"
        case s.DynamicNTK(factor, context):
            return f"dynamic NTK scaling by {factor:g} past {context:,} tokens"
        case s.Llama3Scaling(factor, low, high, context):
            ends = sorted({context / high, context / low})
            return f"llama3 scaling by {factor:g} (wavelengths over {' .. '.join(map(_number, ends))} tokens)"
        case s.Yarn():
            return _yarn(rope.scaling)
        case s.LongRope(short, long, context, gain):
            factors = f"{len(short)} short and {len(long)} long factors"
            return f"LongRoPE past {context:,} tokens ({factors}, attention factor {gain:.5g})"


def _yarn(y: s.Yarn) -> str:
    ends = "" if y.truncate else ", not truncated"
    details = f"beta {y.beta_fast:g} .. {y.beta_slow:g}{ends}, attention factor {y.attention_factor:.5g}"
    return f"YaRN by {y.factor:g} past {y.original_context:,} tokens ({details})"


def _norm(n: s.Norm) -> str:
    return _list(
        f"{'LayerNorm' if n.kind == 'layer' else 'RMSNorm'}{' with bias' if n.bias else ''}",
        f"eps {_number(n.eps)}",
        f"weight stored minus {n.weight_offset:g}" if n.weight_offset else None,
        "weight applied in fp32" if n.scale_in_fp32 else None,
    )


def _residual(x: s.Layer) -> str:
    return RESIDUALS[x.residual] + (", tanh gate on each sublayer" if x.gated else "")


def _heads(a: s.Attention) -> str:
    if a.n_kv_heads == a.n_heads:
        return f"{a.n_heads} heads of {a.head_dim} (MHA)"
    kind = "1 KV head (MQA)" if a.n_kv_heads == 1 else f"{a.n_kv_heads} KV heads (GQA)"
    return f"{a.n_heads} query heads of {a.head_dim}, {kind}"


def _attention(a: s.Attention) -> str:
    if a.cross:
        return "cross-attention to image features"
    if a.window is None and a.chunk is None:
        return "full"
    window = f"sliding window of {a.window:,}" if a.window else None
    return _list(window, f"chunks of {a.chunk:,}" if a.chunk else None)


def _scores(a: s.Attention) -> str:
    norms = {"head": "QK norm per head", "full": "QK norm over all heads", "l2": "QK L2 norm after RoPE"}
    return _list(
        norms.get(a.qk_norm or ""),
        f"scale {a.scale:.6g}" if a.scale is not None else None,  # otherwise 1 / sqrt(head_dim)
        f"soft cap {a.softcap:g}" if a.softcap is not None else None,
        f"temperature tuning {a.temperature_tuning[1]:g} every {_number(a.temperature_tuning[0])} tokens"
        if a.temperature_tuning
        else None,
        "attention sinks" if a.sinks else None,
        nothing="scaled dot product",
    )


def _biases(a: s.Attention) -> str:
    return {
        (False, False): "none",
        (True, False): "on q, k, v",
        (False, True): "on the output",
        (True, True): "on q, k, v and the output",
    }[a.bias]


def _mlp(m: s.Mlp) -> str:
    if m.gated:
        kind = GATED.get(m.act, f"gated by {ACTS.get(m.act, m.act)}") + f" of {m.hidden_dim:,}"
    else:
        kind = f"{ACTS.get(m.act, m.act)} of {m.hidden_dim:,}"
    return _list(
        kind,
        "with biases" if m.bias else None,
        f"clamped at {m.clamp:g}" if m.clamp is not None else None,
        f"up + {m.up_offset:g}" if m.up_offset else None,
    )


def _moe(m: s.Moe) -> str:
    gate = " with a gate" if m.shared_gate else ""
    return _list(
        f"{m.top_k} of {m.n_experts} experts ({_mlp(m.expert)})",
        f"{m.score_func} router{' with bias' if m.router_bias else ''}",
        "weights renormalized" if m.renormalize else None,
        "weights scale expert inputs" if m.scale_expert_input else None,
        f"shared expert{gate} ({_mlp(m.shared)})" if m.shared else None,
    )


def _head(spec: s.Spec) -> str:
    return _list(
        "tied to the embedding" if spec.tied else "untied",
        "with bias" if spec.head_bias else None,
        f"logit scale {spec.logit_scale:g}" if spec.logit_scale != 1 else None,
        f"soft cap {spec.logit_softcap:g}" if spec.logit_softcap is not None else None,
    )


def _differences(a: Any, b: Any, path: str) -> list[tuple[str, Any, Any]]:
    """Every field in which two trees differ: `pattern[0].attn.rope.scaling.short_factor[3]`."""
    if a == b:
        return []
    if is_dataclass(a) and type(a) is type(b):
        names = [f.name for f in fields(a)]
        lists = [_differences(getattr(a, n), getattr(b, n), f"{path}.{n}".lstrip(".")) for n in names]
        return [x for each in lists for x in each]
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return [x for i, (x1, x2) in enumerate(zip(a, b, strict=True)) for x in _differences(x1, x2, f"{path}[{i}]")]
    return [(path, a, b)]
