"""Llama 1 to 3.3, SmolLM3, the text sides of Llama 3.2 Vision and of Llama 4; and the names most classes share."""

from __future__ import annotations

from typing import Any

from oneblock.errors import OneblockError
from oneblock.spec import FAMILIES as BUILD
from oneblock.spec import Layer, Moe, Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import Fields, Raw
from oneblock.store.families.rope import read_rope, write_rope
from oneblock.store.name_tables import Family, TensorRule, prefix_names, rule

OUTER = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}
ATTENTION = {
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo",
}
QK_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
MLP = {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
PRE_NORMS = {"input_layernorm": "attn_in", "post_attention_layernorm": "mlp_in"}
LAYER = {**ATTENTION, **MLP, **PRE_NORMS}
LLAMA_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", LAYER)}

# ------------------------------------------------------------------ Llama

LLAMA = fields.SIZES | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA |= {"num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "attention_bias": False}
LLAMA |= {"mlp_bias": False}


def head_dim(keywords: dict[str, Any]) -> int:
    return keywords["head_dim"] or keywords["dim"] // keywords["n_heads"]


def read_llama(raw: Raw) -> Spec:
    f = Fields(raw, LLAMA)
    common = fields.sizes(f)
    return BUILD["llama"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common)),
        attention_bias=f.flag("attention_bias"),
        mlp_bias=f.flag("mlp_bias"),
    )


def write_llama(spec: Spec) -> Raw:
    attn, mlp = spec.layers[0].attn, fields.some_mlp(spec)
    return {
        **fields.sizes_written(spec),
        "intermediate_size": mlp.hidden_dim,
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "attention_bias": attn.bias[0],
        "mlp_bias": mlp.bias,
    }


# ------------------------------------------------------------------ SmolLM3

SMOLLM3 = LLAMA | {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
SMOLLM3 |= {"num_key_value_heads": 4, "max_position_embeddings": 32768, "use_sliding_window": False}
SMOLLM3 |= {"sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None}
SMOLLM3 |= {"tie_word_embeddings": True}


def rope_layers(f: Fields) -> tuple[bool, ...]:
    """Which layers rotate: `no_rope_layers` holds a 1 where they do, whatever its name says."""
    depth, step = f.whole("num_hidden_layers"), f.whole("no_rope_layer_interval")
    marks = f.layers("no_rope_layers") or [int((i + 1) % step != 0) for i in range(depth)]
    if len(marks) != depth:
        raise OneblockError(f"no_rope_layers has {len(marks)} numbers for {depth} layers; mend it")
    return tuple(bool(mark) for mark in marks)


def read_smollm3(raw: Raw) -> Spec:
    f = Fields(raw, SMOLLM3)
    common, turning = fields.sizes(f), rope_layers(f)
    window = f.whole_or_none("sliding_window") if f.flag("use_sliding_window") else None
    kinds = f.kinds("full_attention", "sliding_attention")
    return BUILD["smollm3"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common), theta=2_000_000.0),
        rope_layers=turning,
        window=window,
        sliding=tuple(kind == "sliding_attention" for kind in kinds) if kinds else tuple(not t for t in turning),
        attention_bias=f.flag("attention_bias"),
        mlp_bias=f.flag("mlp_bias"),
    )


def write_smollm3(spec: Spec) -> Raw:
    attn = next((layer.attn for layer in spec.layers if layer.attn.rope), spec.layers[0].attn)
    return {
        **write_llama(spec),
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "no_rope_layers": [int(layer.attn.rope is not None) for layer in spec.layers],
        "use_sliding_window": fields.window_of(spec) is not None,
        "sliding_window": fields.window_of(spec),
        "layer_types": fields.sliding_kinds(spec),
    }


# ------------------------------------------------------------------ Llama 4

LLAMA4 = LLAMA | {"vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384}
LLAMA4 |= {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128}
LLAMA4 |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 1, "num_local_experts": 16}
LLAMA4 |= {"moe_layers": None, "interleave_moe_layer_step": 1, "use_qk_norm": True, "no_rope_layers": None}
LLAMA4 |= {"no_rope_layer_interval": 4, "attention_chunk_size": 8192, "layer_types": None, "floor_scale": 8192}
LLAMA4 |= {"attn_temperature_tuning": True, "attn_scale": 0.1}


def read_llama4(raw: Raw) -> Spec:
    f = Fields(raw, LLAMA4)
    common, turning = fields.sizes(f), rope_layers(f)
    kinds = f.kinds("full_attention", "chunked_attention")
    step = f.whole("interleave_moe_layer_step")
    sparse = f.layers("moe_layers")
    sparse = list(range(step - 1, common["n_layers"], step)) if sparse is None else sparse
    tuned = bool(f.get("attn_temperature_tuning"))  # 4 in the first uploads
    return BUILD["llama4"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        dense_hidden_dim=f.whole("intermediate_size_mlp"),
        n_experts=f.whole("num_local_experts"),
        top_k=f.whole("num_experts_per_tok"),
        rope=read_rope(f, head_dim(common), theta=500_000.0, interleaved=True),
        rope_layers=turning,
        chunk=f.whole_or_none("attention_chunk_size"),
        chunked=tuple(kind == "chunked_attention" for kind in kinds) if kinds else turning,
        sparse=tuple(i in sparse for i in range(common["n_layers"])),
        qk_norm=f.flag("use_qk_norm"),
        temperature_tuning=(f.number("floor_scale"), f.number("attn_scale")) if tuned else None,
        attention_bias=f.flag("attention_bias"),
    )


def write_llama4(spec: Spec) -> Raw:
    layers = spec.layers
    turning = next((layer.attn for layer in layers if layer.attn.rope), layers[0].attn)
    temperature_tuning = next(
        (layer.attn.temperature_tuning for layer in layers if layer.attn.temperature_tuning), None
    )
    moe = next((layer.mlp for layer in layers if isinstance(layer.mlp, Moe)), Moe(1, 1, fields.some_mlp(spec)))
    tuning = (
        {"floor_scale": int(temperature_tuning[0]), "attn_scale": temperature_tuning[1]} if temperature_tuning else {}
    )
    return {
        **fields.sizes_written(spec),
        "intermediate_size": moe.expert.hidden_dim,
        "intermediate_size_mlp": fields.dense_hidden(spec, LLAMA4["intermediate_size_mlp"]),
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "rope_parameters": write_rope(turning.rope, turning.head_dim),
        "no_rope_layers": [int(layer.attn.rope is not None) for layer in layers],
        "attention_chunk_size": next((layer.attn.chunk for layer in layers if layer.attn.chunk), None),
        "layer_types": ["chunked_attention" if layer.attn.chunk else "full_attention" for layer in layers],
        "moe_layers": [i for i, layer in enumerate(layers) if isinstance(layer.mlp, Moe)],
        "use_qk_norm": turning.qk_norm == "l2",
        "attn_temperature_tuning": temperature_tuning is not None,
        **tuning,
        "attention_bias": turning.bias[0],
    }


def _feed_forward() -> dict[str, Any]:
    return {
        "gate_proj": "mlp.gate",
        "up_proj": "mlp.up",
        "down_proj": "mlp.down",
        "router": "mlp.router",
        "shared_expert.gate_proj": "mlp.shared.gate",
        "shared_expert.up_proj": "mlp.shared.up",
        "shared_expert.down_proj": "mlp.shared.down",
        "experts.gate_up_proj": rule("mlp.experts.gate", "mlp.experts.up", transposed=True),
        "experts.down_proj": rule("mlp.experts.down", transposed=True),
    }


LLAMA4_NAMES = {
    **OUTER,
    **prefix_names("model.layers.{n}.", {**ATTENTION, **PRE_NORMS}),
    **prefix_names("model.layers.{n}.feed_forward.", _feed_forward()),
}

# ------------------------------------------------------------------ Llama 3.2 Vision, text side

MLLAMA_CROSSING = [3, 8, 13, 18, 23, 28, 33, 38]
MLLAMA = LLAMA | {"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32}
MLLAMA |= {"num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5}
MLLAMA |= {"max_position_embeddings": 131072, "cross_attention_layers": None}


def read_mllama(raw: Raw) -> Spec:
    f = Fields(raw, MLLAMA)
    common = fields.sizes(f)
    f.only("head_dim", None, common["dim"] // common["n_heads"])
    given = f.layers("cross_attention_layers")
    crossing = MLLAMA_CROSSING if given is None else given
    keywords = common | {"tied": False}  # the class never ties: its input has rows that its output has not
    return BUILD["mllama"](
        **keywords,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common), theta=500_000.0),
        cross=tuple(i in crossing for i in range(common["n_layers"])),
    )


def write_mllama(spec: Spec) -> Raw:
    def crosses(layer: Layer) -> bool:
        return layer.attn.cross

    own = next((layer.attn for layer in spec.layers if not crosses(layer)), spec.layers[0].attn)
    raw = {
        **fields.sizes_written(spec),
        "intermediate_size": fields.dense_hidden(spec),
        "rope_parameters": write_rope(own.rope, own.head_dim),
        "cross_attention_layers": [i for i, layer in enumerate(spec.layers) if crosses(layer)],
    }
    del raw["head_dim"]
    return raw


def _only(cross: bool, rows: dict[str, str]) -> dict[str, TensorRule]:
    return {disk: rule(ours, cross=cross) for disk, ours in rows.items()}


CROSS = {disk.replace("self_attn", "cross_attn"): ours for disk, ours in {**ATTENTION, **QK_NORMS}.items()}
GATES = {"cross_attn_attn_gate": "attn_gate", "cross_attn_mlp_gate": "mlp_gate"}
MLLAMA_NAMES = {
    **OUTER,
    **prefix_names("model.layers.{n}.", {**MLP, **PRE_NORMS, **GATES, **_only(False, ATTENTION), **_only(True, CROSS)}),
}

FAMILIES = (
    Family(("llama",), "LlamaForCausalLM", read_llama, write_llama, (LLAMA_NAMES,)),
    Family(("smollm3",), "SmolLM3ForCausalLM", read_smollm3, write_smollm3, (LLAMA_NAMES,)),
    Family(("llama4_text",), "Llama4ForCausalLM", read_llama4, write_llama4, (LLAMA4_NAMES,), wrappers=("llama4",)),
    Family(
        ("mllama_text_model",),
        "MllamaForCausalLM",
        read_mllama,
        write_mllama,
        (MLLAMA_NAMES,),
        wrappers=("mllama",),
    ),
)
