"""Reading a config.json with its class's defaults, and the parts that many classes write the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oneblock.errors import OneblockError
from oneblock.spec import Attention, Mlp, Moe, Spec

Raw = dict[str, Any]

ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}
ACT_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
ACT_NAMES |= {"relu": "relu", "relu2": "relu2"}


class Fields:
    """A config.json, with the class's default where a key is absent. Each getter checks the type it returns."""

    def __init__(self, raw: Raw, defaults: Mapping[str, Any]):
        self.raw, self.defaults = raw, defaults

    def get(self, key: str, *others: str) -> Any:
        """The value of a key, or of another name that the class has for it."""
        for name in (key, *others):
            if name in self.raw:
                return self.raw[name]
        return self.defaults[key]

    def whole(self, key: str, *others: str) -> int:
        value = self.get(key, *others)
        if type(value) is not int or value < 1:
            raise OneblockError(f"{key} is {value!r}, not a whole number above 0; mend it")
        return value

    def whole_or_none(self, key: str, *others: str) -> int | None:
        return None if self.get(key, *others) is None else self.whole(key, *others)

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OneblockError(f"{key} is {value!r}, not a number; mend it")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise OneblockError(f"{key} is {value!r}, neither true nor false; mend it")
        return value

    def act(self, key: str, names: Mapping[str, str] = ACTS) -> str:
        value = self.get(key)
        if value not in names:
            raise OneblockError(f"{key} {value!r} is not supported; supported are {', '.join(names)}")
        return names[value]

    def layers(self, key: str) -> list[int] | None:
        """A list of layer numbers, or one number per layer."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and all(type(x) is int for x in value)):
            raise OneblockError(f"{key} is {value!r}, not a list of whole numbers; mend it")
        return value

    def kinds(self, *known: str) -> list[str] | None:
        """`layer_types`, one per layer, each of the known ones."""
        value, depth = self.get("layer_types"), self.whole("num_hidden_layers")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != depth or any(kind not in known for kind in value):
            raise OneblockError(f"layer_types must hold {depth} of {', '.join(known)}; mend it")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a setting whose other values change the model in a way that is not implemented."""
        value = self.get(key)
        if value not in allowed:
            wanted = " or ".join(repr(x) for x in allowed)
            raise OneblockError(f"{key} {value!r} is not supported, only {wanted}: this model cannot be loaded")


SIZES: dict[str, Any] = {  # what the classes with Llama's names have in common
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": None,
}


def sizes(f: Fields, eps: str = "rms_norm_eps", act: str = "hidden_act") -> dict[str, Any]:
    """The builder keywords that the classes with Llama's names have in common, but for `rope`."""
    return {
        "vocab": f.whole("vocab_size"),
        "dim": f.whole("hidden_size"),
        "n_layers": f.whole("num_hidden_layers"),
        "n_heads": f.whole("num_attention_heads"),
        "n_kv_heads": f.whole_or_none("num_key_value_heads"),
        "head_dim": f.whole_or_none("head_dim"),
        "context": f.whole("max_position_embeddings"),
        "norm_eps": f.number(eps),
        "act": f.act(act),
        "tied": f.flag("tie_word_embeddings"),
    }


def sizes_written(spec: Spec, eps: str = "rms_norm_eps", act: str = "hidden_act") -> Raw:
    """The keys that `sizes` reads, but for those of the MLP's size."""
    attn = spec.layers[0].attn
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": attn.n_heads,
        "num_key_value_heads": attn.n_kv_heads,
        "head_dim": attn.head_dim,
        "max_position_embeddings": spec.context,
        eps: spec.norm.eps,
        act: ACT_NAMES[some_mlp(spec).act],
        "tie_word_embeddings": spec.tied,
    }


def some_mlp(spec: Spec) -> Mlp:
    mlp = spec.layers[0].mlp
    return mlp.expert if isinstance(mlp, Moe) else mlp


def dense_hidden(spec: Spec, default: int = 4) -> int:
    """The size of the MLP in layers without experts; where there is none, any number does."""
    return next((layer.mlp.hidden_dim for layer in spec.layers if isinstance(layer.mlp, Mlp)), default)


def some_moe(spec: Spec) -> Moe:
    return next(layer.mlp for layer in spec.layers if isinstance(layer.mlp, Moe))


def window_of(spec: Spec) -> int | None:
    return next((layer.attn.window for layer in spec.layers if layer.attn.window), None)


def sliding_kinds(spec: Spec) -> list[str]:
    return ["sliding_attention" if layer.attn.window else "full_attention" for layer in spec.layers]


def full_attention(spec: Spec) -> Attention:
    """The attention of a layer without a window, or of the first."""
    return next((layer.attn for layer in spec.layers if not layer.attn.window), spec.layers[0].attn)
