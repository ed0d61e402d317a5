"""config.json <-> builder keywords: one two-way table per Hugging Face class.

A class lists its keys with their defaults (`ConfigTable.defaults`). A key's `Field` says which keyword of the family's
builder it sets, how it is checked and converted, and how it is read from a Spec. Where several keys together give one
keyword (RoPE, layer types), a `Group` does both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from oneblock.errors import OneblockError
from oneblock.spec import FAMILIES, Attention, Mlp, Moe, Spec
from oneblock.spec.build import LIMITS, check_limit

Raw = dict[str, Any]
Keywords = dict[str, Any]  # of a family's builder

# ------------------------------------------------------------------ types of values


def read_int(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise OneblockError(f"{key} is {value!r}, not an integer above 0; fix it")
    return value


def read_number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise OneblockError(f"{key} is {value!r:.40}, not a finite number; fix it")
    return float(value)


def read_flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OneblockError(f"{key} is {value!r}, neither true nor false; fix it")
    return value


def identity(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Kind:
    """A type of value: `read` checks and converts it, `write` converts it back."""

    read: Callable[[str, Any], Any]
    write: Callable[[Any], Any] = identity
    optional: bool = False  # null is a value


INT, NUMBER, FLAG = Kind(read_int), Kind(read_number), Kind(read_flag)
INT_OR_NULL, NUMBER_OR_NULL = Kind(read_int, optional=True), Kind(read_number, optional=True)
NOT_FLAG = Kind(lambda key, value: not read_flag(key, value), lambda value: not value)


def activation(names: Mapping[str, str], written: Mapping[str, str]) -> Kind:
    """An activation function: disk name -> ours, and ours -> the disk name that is written."""

    def read(key: str, value: Any) -> str:
        if value not in names:
            raise OneblockError(f"{key} {value!r} is not supported; supported are {', '.join(names)}")
        return names[value]

    return Kind(read, lambda act: written[act])


ACTS = {act: act for act in ("gelu", "quick_gelu", "silu", "relu", "relu2")} | {"gelu_python": "gelu", "swish": "silu"}
ACTS |= {f"gelu_{kind}": "gelu_tanh" for kind in ("new", "fast", "accurate", "pytorch_tanh", "python_tanh")}
ACT_WRITTEN = {act: act for act in ("gelu", "quick_gelu", "silu", "relu", "relu2")} | {"gelu_tanh": "gelu_pytorch_tanh"}
ACT = activation(ACTS, ACT_WRITTEN)
NEW_ACT = activation(ACTS, ACT_WRITTEN | {"gelu_tanh": "gelu_new"})

# ------------------------------------------------------------------ parts of a Spec that fields are read from


def first_attention(spec: Spec) -> Attention:
    return spec.pattern[0].attn


def full_attention(spec: Spec) -> Attention:
    """The attention of a layer without a window, or of the first layer."""
    return next((layer.attn for layer in spec.pattern if not layer.attn.window), spec.pattern[0].attn)


def rope_attention(spec: Spec) -> Attention:
    """The attention of a layer with RoPE, or of the first layer."""
    return next((layer.attn for layer in spec.pattern if layer.attn.rope), spec.pattern[0].attn)


def first_mlp(spec: Spec) -> Mlp:
    mlp = spec.pattern[0].mlp
    return mlp.expert if isinstance(mlp, Moe) else mlp


def dense_hidden_dim(spec: Spec) -> int | None:
    return next((layer.mlp.hidden_dim for layer in spec.pattern if isinstance(layer.mlp, Mlp)), None)


def of_moe(get: Callable[[Moe], Any]) -> Callable[[Spec], Any]:
    """A value of the first mixture of experts; None without one."""
    return lambda spec: next((get(layer.mlp) for layer in spec.pattern if isinstance(layer.mlp, Moe)), None)


def window_of(spec: Spec) -> int | None:
    return next((layer.attn.window for layer in spec.pattern if layer.attn.window), None)


def per_layer(test: Callable[[Attention], Any]) -> Callable[[Spec], list[bool]]:
    return lambda spec: [bool(test(layer.attn)) for layer in spec.layers]


is_sliding, is_chunked = per_layer(lambda attn: attn.window), per_layer(lambda attn: attn.chunk)
has_rope, is_cross = per_layer(lambda attn: attn.rope), per_layer(lambda attn: attn.cross)


def layer_types(spec: Spec) -> list[str]:
    return ["sliding_attention" if slides else "full_attention" for slides in is_sliding(spec)]


# ------------------------------------------------------------------ keys


@dataclass(frozen=True)
class Field:
    """A key of config.json: the builder keyword it sets, its type, and its value in a Spec."""

    keyword: str
    kind: Kind
    get: Callable[[Spec], Any]  # None: the key is written with the class's default
    alias: str | None = None  # another name that the class has for the key


N_EXPERTS = Field("n_experts", INT, of_moe(lambda moe: moe.n_experts), alias="num_experts")
NORM_EPS = Field("norm_eps", NUMBER, lambda spec: spec.norm.eps)
WINDOW = Field("window", INT_OR_NULL, window_of)
BIAS = Field("attention_bias", FLAG, lambda spec: first_attention(spec).bias[0])
HIDDEN_DIM = Field("hidden_dim", INT, dense_hidden_dim)
EXPERT_DIM = Field("hidden_dim", INT, of_moe(lambda moe: moe.expert.hidden_dim))  # where `hidden_dim` is an expert's

KEYS: dict[str, Field] = {  # keys that mean the same in every class
    "vocab_size": Field("vocab", INT, lambda spec: spec.vocab),
    "hidden_size": Field("dim", INT, lambda spec: spec.dim),
    "num_hidden_layers": Field("n_layers", INT, lambda spec: spec.n_layers),
    "num_attention_heads": Field("n_heads", INT, lambda spec: first_attention(spec).n_heads),
    "num_key_value_heads": Field("n_kv_heads", INT_OR_NULL, lambda spec: first_attention(spec).n_kv_heads),
    "head_dim": Field("head_dim", INT_OR_NULL, lambda spec: first_attention(spec).head_dim),
    "max_position_embeddings": Field("context", INT, lambda spec: spec.context),
    "rms_norm_eps": NORM_EPS,
    "layer_norm_eps": NORM_EPS,
    "layer_norm_epsilon": NORM_EPS,
    "hidden_act": Field("act", ACT, lambda spec: first_mlp(spec).act),
    "hidden_activation": Field("act", ACT, lambda spec: first_mlp(spec).act),
    "activation_function": Field("act", NEW_ACT, lambda spec: first_mlp(spec).act),
    "tie_word_embeddings": Field("tied", FLAG, lambda spec: spec.tied),
    "intermediate_size": HIDDEN_DIM,
    "attention_bias": BIAS,
    "mlp_bias": Field("mlp_bias", FLAG, lambda spec: first_mlp(spec).bias),
    "sliding_window": WINDOW,
    "final_logit_softcapping": Field("logit_softcap", NUMBER_OR_NULL, lambda spec: spec.logit_softcap),
    "logit_scale": Field("logit_scale", NUMBER, lambda spec: spec.logit_scale),
    "num_local_experts": N_EXPERTS,
    "num_experts": replace(N_EXPERTS, alias="num_local_experts"),
    "num_experts_per_tok": Field("top_k", INT, of_moe(lambda moe: moe.top_k)),
    "norm_topk_prob": Field("renormalize", FLAG, of_moe(lambda moe: moe.renormalize)),
    "moe_intermediate_size": Field("expert_hidden_dim", INT, of_moe(lambda moe: moe.expert.hidden_dim)),
}


def defaults(
    vocab: int, dim: int, hidden_dim: int, layers: int, heads: int, kv_heads: int | None, context: int, **more: Any
) -> Raw:
    """The defaults of a class with Llama's keys; `more` are other keys, or other values. `...` removes a key."""
    raw = {"vocab_size": vocab, "hidden_size": dim, "intermediate_size": hidden_dim, "num_hidden_layers": layers}
    raw |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": context}
    raw |= {"head_dim": None, "hidden_act": "silu", "tie_word_embeddings": False, **more}
    return {key: value for key, value in raw.items() if value is not ...}


class Values:
    """A config.json with the class's defaults for absent keys."""

    def __init__(self, raw: Raw, table: ConfigTable):
        self.raw, self.table = raw, table

    def get(self, key: str, alias: str | None = None) -> Any:
        return next((self.raw[name] for name in (key, alias) if name in self.raw), self.table.defaults[key])

    def read(self, key: str, kind: Kind, alias: str | None = None) -> Any:
        value = self.get(key, alias)
        return None if value is None and kind.optional else kind.read(key, value)

    def read_field(self, key: str, row: Field) -> Any:
        value = self.read(key, row.kind, row.alias)
        if value is not None and row.keyword in LIMITS:
            check_limit(row.keyword, value, key)
        return value

    def ints(self, key: str) -> list[int] | None:
        """A list of layer numbers, or one number per layer."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and all(type(x) is int for x in value)):
            raise OneblockError(f"{key} is {value!r:.60}, not a list of integers; fix it")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a setting whose other values change the model in a way that is not implemented."""
        value = self.get(key)
        if value not in allowed:
            supported = " or ".join(repr(x) for x in allowed)
            raise OneblockError(f"{key} {value!r} is not supported, only {supported}: this model cannot be loaded")


# ------------------------------------------------------------------ groups of keys


class TwoWay(Protocol):
    """Keys that give builder keywords together, both ways."""

    def read(self, values: Values, keywords: Keywords, /) -> Keywords: ...

    def write(self, spec: Spec, /) -> Raw: ...


@dataclass(frozen=True)
class Group:
    """A TwoWay of two functions."""

    read: Callable[[Values, Keywords], Keywords]  # of the config, and of the keywords that single keys gave
    write: Callable[[Spec], Raw]


def layer_types_group(
    fallback: Callable[[Values, Keywords], Sequence[bool]],  # where the config has no layer_types
    keyword: str = "sliding",
    kind: str = "sliding_attention",
    get: Callable[[Spec], list[bool]] = is_sliding,
) -> Group:
    """`layer_types`: one flag per layer, for sliding windows or for chunks."""

    def read(values: Values, keywords: Keywords) -> Keywords:
        kinds, n_layers = values.get("layer_types"), keywords["n_layers"]
        if kinds is None:
            return {keyword: tuple(fallback(values, keywords))}
        known = ("full_attention", kind)
        if not isinstance(kinds, list) or len(kinds) != n_layers or any(each not in known for each in kinds):
            raise OneblockError(f"layer_types must hold {n_layers} of {', '.join(known)}; fix it")
        return {keyword: tuple(each == kind for each in kinds)}

    return Group(read, lambda spec: {"layer_types": [kind if x else "full_attention" for x in get(spec)]})


def every(values: Values, keywords: Keywords) -> list[bool]:
    """All layers slide but each `sliding_window_pattern`-th."""
    step = values.read("sliding_window_pattern", INT)
    return [(i + 1) % step != 0 for i in range(keywords["n_layers"])]


def alternate(_: Values, keywords: Keywords) -> list[bool]:
    return [i % 2 == 0 for i in range(keywords["n_layers"])]


def _read_switched_window(values: Values, _: Keywords) -> Keywords:
    use, window = values.read("use_sliding_window", FLAG), values.get("sliding_window")
    return {"window": values.read_field("sliding_window", WINDOW) if use and window != 0 else None}


SWITCHED_WINDOW = Group(
    _read_switched_window,
    lambda spec: {"use_sliding_window": window_of(spec) is not None, "sliding_window": window_of(spec)},
)

# ------------------------------------------------------------------ tables


@dataclass(frozen=True)
class ConfigTable:
    """The configuration of a class, both ways."""

    family: str  # whose builder takes the keywords
    defaults: Raw  # the keys of the class, with its default values
    groups: tuple[TwoWay, ...] = ()
    fields: Mapping[str, Field | None] = field(default_factory=dict)  # keys that mean something else; None: a group's
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # settings with one supported meaning
    constants: Raw = field(default_factory=dict)  # written, not read

    def rows(self) -> dict[str, Field]:
        known: dict[str, Field | None] = {**KEYS, **self.fields}
        return {key: row for key in self.defaults if (row := known.get(key)) is not None}

    def read(self, raw: Raw) -> Spec:
        values = Values(raw, self)
        for key, allowed in self.only.items():
            values.only(key, *allowed)
        keywords = {row.keyword: values.read_field(key, row) for key, row in self.rows().items()}
        for group in self.groups:
            keywords |= group.read(values, keywords)
        return FAMILIES[self.family](**keywords)

    def write(self, spec: Spec) -> Raw:
        raw: Raw = {}
        for key, row in self.rows().items():
            value = row.get(spec)
            is_absent = value is None and not row.kind.optional
            raw[key] = self.defaults[key] if is_absent else None if value is None else row.kind.write(value)
        for group in self.groups:
            raw |= group.write(spec)
        return raw | self.constants
