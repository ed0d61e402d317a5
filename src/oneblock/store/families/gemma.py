"""Gemma 1, 2 and 3."""

from __future__ import annotations

from typing import Any

from oneblock.errors import OneblockError
from oneblock.spec import FAMILIES as BUILD
from oneblock.spec import Rope, Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import Fields, Raw
from oneblock.store.families.llama import ATTENTION, LLAMA_NAMES, MLP, OUTER, QK_NORMS, head_dim
from oneblock.store.families.rope import read_rope, rope_from, write_rope
from oneblock.store.name_tables import Family, prefix_names

GEMMA = fields.SIZES | {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28}
GEMMA |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "rms_norm_eps": 1e-6}
GEMMA |= {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True}
GEMMA |= {"attention_bias": False, "use_bidirectional_attention": None}
GEMMA2 = GEMMA | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
GEMMA2 |= {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
GEMMA2 |= {"sliding_window": 4096, "layer_types": None, "final_logit_softcapping": 30.0}
GEMMA2 |= {"attn_logit_softcapping": 50.0}
GEMMA3 = GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None}
GEMMA3 |= {"sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0, "rope_theta": 1_000_000.0}

GEMMA_ACTS = fields.ACTS | {"gelu": "gelu_tanh"}  # the first uploads say "gelu" and mean the tanh form


def read_gemma(raw: Raw) -> Spec:
    f = Fields(raw, GEMMA)
    f.only("use_bidirectional_attention", None, False)
    common = fields.sizes(f) | {"act": f.act("hidden_act", GEMMA_ACTS)}
    return BUILD["gemma"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common)),
        attention_bias=f.flag("attention_bias"),
    )


def write_gemma(spec: Spec) -> Raw:
    attn = spec.layers[0].attn
    return {
        **fields.sizes_written(spec),
        "intermediate_size": fields.some_mlp(spec).hidden_dim,
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "attention_bias": attn.bias[0],
    }


def _windowed(f: Fields, every: int) -> dict[str, Any]:
    """The builder keywords of Gemma 2 and 3; without layer_types every `every`-th layer sees all."""
    f.only("use_bidirectional_attention", None, False)
    kinds, depth = f.kinds("full_attention", "sliding_attention"), f.whole("num_hidden_layers")
    sliding = [k == "sliding_attention" for k in kinds] if kinds else [(i + 1) % every != 0 for i in range(depth)]
    return {
        **fields.sizes(f, act="hidden_activation"),
        "hidden_dim": f.whole("intermediate_size"),
        "window": f.whole_or_none("sliding_window"),
        "sliding": tuple(sliding),
        "query_scalar": f.number("query_pre_attn_scalar"),
        "logit_softcap": f.number_or_none("final_logit_softcapping"),
        "attention_bias": f.flag("attention_bias"),
    }


def _windowed_written(spec: Spec) -> Raw:
    attn = spec.layers[0].attn
    scalar = attn.head_dim if attn.scale is None else round(attn.scale**-2)
    return {
        **fields.sizes_written(spec, act="hidden_activation"),
        "intermediate_size": fields.some_mlp(spec).hidden_dim,
        "sliding_window": fields.window_of(spec),
        "layer_types": fields.sliding_kinds(spec),
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": spec.logit_softcap,
        "attention_bias": attn.bias[0],
    }


def read_gemma2(raw: Raw) -> Spec:
    f = Fields(raw, GEMMA2)
    common = _windowed(f, every=2)
    softcap = f.number_or_none("attn_logit_softcapping")
    return BUILD["gemma2"](**common, softcap=softcap, rope=read_rope(f, head_dim(common)))


def write_gemma2(spec: Spec) -> Raw:
    attn = spec.layers[0].attn
    rope = write_rope(attn.rope, attn.head_dim)
    return {**_windowed_written(spec), "attn_logit_softcapping": attn.softcap, "rope_parameters": rope}


def read_gemma3(raw: Raw) -> Spec:
    """As in transformers, `attn_logit_softcapping` has no effect."""
    f = Fields(raw, GEMMA3)
    common = _windowed(f, every=f.whole("sliding_window_pattern"))
    full, local = _ropes(f, head_dim(common))
    return BUILD["gemma3"](**common, rope=full, rope_local=local)


def _ropes(f: Fields, width: int) -> tuple[Rope, Rope]:
    """Of the full and of the windowed layers; the older `rope_scaling` is for the full ones alone."""
    nested = f.raw.get("rope_parameters") or {}
    if not isinstance(nested, dict) or nested.keys() - {"full_attention", "sliding_attention"}:
        raise OneblockError("rope_parameters must hold full_attention and sliding_attention; mend it")
    bases = {"full_attention": f.number("rope_theta"), "sliding_attention": f.number("rope_local_base_freq")}
    raws = {kind: {"rope_theta": base, **(nested.get(kind) or {})} for kind, base in bases.items()}
    raws["full_attention"] |= f.raw.get("rope_scaling") or {}
    for raw in raws.values():
        raw.pop("truncate", None)  # transformers looks for it outside the nested sets, where it is not
    full, local = (rope_from(f, raws[kind], width, can_be_partial=False) for kind in bases)
    return full, local


def write_gemma3(spec: Spec) -> Raw:
    full = next((layer.attn.rope for layer in spec.layers if not layer.attn.window), None)
    local = next((layer.attn.rope for layer in spec.layers if layer.attn.window), None)
    width = spec.layers[0].attn.head_dim
    ropes = {"full_attention": write_rope(full, width), "sliding_attention": write_rope(local, width)}
    return {**_windowed_written(spec), "rope_parameters": ropes}


SANDWICH = {
    "input_layernorm": "attn_in",
    "post_attention_layernorm": "attn_out",
    "pre_feedforward_layernorm": "mlp_in",
    "post_feedforward_layernorm": "mlp_out",
}
GEMMA3_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", {**ATTENTION, **QK_NORMS, **MLP, **SANDWICH})}

FAMILIES = (
    Family(("gemma",), "GemmaForCausalLM", read_gemma, write_gemma, (LLAMA_NAMES,)),
    Family(("gemma2",), "Gemma2ForCausalLM", read_gemma2, write_gemma2, (GEMMA3_NAMES,)),
    Family(("gemma3_text",), "Gemma3ForCausalLM", read_gemma3, write_gemma3, (GEMMA3_NAMES,), wrappers=("gemma3",)),
)
