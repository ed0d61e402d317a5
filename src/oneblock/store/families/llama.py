"""Llama 1 to 3.3, SmolLM3, the text sides of Llama 3.2 Vision and Llama 4; and the names that most classes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from oneblock.errors import OneblockError
from oneblock.spec import Moe, Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import FLAG, INT, NUMBER, ConfigTable, Field, Group, Keywords, Raw, Values
from oneblock.store.families.rope import RopeKeys
from oneblock.store.name_tables import Family, TensorRule, prefix_names, rule

OUTER = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}
ATTENTION = {f"self_attn.{x}_proj": f"attn.w{x}" for x in "qkvo"}
QK_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
MLP = {f"mlp.{x}_proj": f"mlp.{x}" for x in ("gate", "up", "down")}
PRE_NORMS = {"input_layernorm": "attn_in", "post_attention_layernorm": "mlp_in"}
LAYER = {**ATTENTION, **MLP, **PRE_NORMS}
LLAMA_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", LAYER)}

# ------------------------------------------------------------------ Llama

LLAMA = ConfigTable(
    "llama",
    fields.defaults(32000, 4096, 11008, 32, 32, None, 2048, rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False),
    (RopeKeys(),),
)

# ------------------------------------------------------------------ SmolLM3


def _read_rope_layers(values: Values, keywords: Keywords) -> Keywords:
    """`no_rope_layers` holds a 1 where a layer has RoPE, whatever its name says."""
    depth, step = keywords["n_layers"], values.read("no_rope_layer_interval", INT)
    marks = values.ints("no_rope_layers") or [int((i + 1) % step != 0) for i in range(depth)]
    if len(marks) != depth:
        raise OneblockError(f"no_rope_layers has {len(marks)} numbers for {depth} layers; fix it")
    return {"rope_layers": tuple(bool(mark) for mark in marks)}


ROPE_LAYERS = Group(_read_rope_layers, lambda spec: {"no_rope_layers": [int(x) for x in fields.has_rope(spec)]})

SMOLLM3 = ConfigTable(
    "smollm3",
    fields.defaults(128256, 2048, 11008, 36, 16, 4, 32768, rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False)
    | {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None, "layer_types": None}
    | {"no_rope_layers": None, "no_rope_layer_interval": 4},
    (
        RopeKeys(theta=2_000_000.0),
        ROPE_LAYERS,
        fields.SWITCHED_WINDOW,
        fields.layer_types_group(lambda _, keywords: [not has_rope for has_rope in keywords["rope_layers"]]),
    ),
    fields={"sliding_window": None},
)

# ------------------------------------------------------------------ Llama 4


def _read_moe_layers(values: Values, keywords: Keywords) -> Keywords:
    depth, step = keywords["n_layers"], values.read("interleave_moe_layer_step", INT)
    sparse = values.ints("moe_layers")
    sparse = range(step - 1, depth, step) if sparse is None else sparse
    return {"sparse": tuple(i in sparse for i in range(depth))}


def moe_layers(spec: Spec, sparse: bool = True) -> list[int]:
    """The numbers of the layers with experts, or of the others."""
    return [i for i, layer in enumerate(spec.layers) if isinstance(layer.mlp, Moe) == sparse]


def _read_tuning(values: Values, _: Keywords) -> Keywords:
    tuning = values.read("floor_scale", NUMBER), values.read("attn_scale", NUMBER)
    return {"temperature_tuning": tuning if values.get("attn_temperature_tuning") else None}  # 4 in the first uploads


def _has_rope(_: Values, keywords: Keywords) -> Sequence[bool]:
    return keywords["rope_layers"]


def _write_tuning(spec: Spec) -> Raw:
    tuning = next((layer.attn.temperature_tuning for layer in spec.pattern if layer.attn.temperature_tuning), None)
    if tuning is None:
        return {"attn_temperature_tuning": False}
    return {"attn_temperature_tuning": True, "floor_scale": int(tuning[0]), "attn_scale": tuning[1]}


def _chunk(spec: Spec) -> int | None:
    return next((layer.attn.chunk for layer in spec.pattern if layer.attn.chunk), None)


LLAMA4 = ConfigTable(
    "llama4",
    fields.defaults(202048, 5120, 8192, 48, 40, 8, 131072, rms_norm_eps=1e-5, attention_bias=False, head_dim=128)
    | {"intermediate_size_mlp": 16384, "num_experts_per_tok": 1, "num_local_experts": 16, "use_qk_norm": True}
    | {"moe_layers": None, "interleave_moe_layer_step": 1, "no_rope_layers": None, "no_rope_layer_interval": 4}
    | {"attention_chunk_size": 8192, "layer_types": None, "attn_temperature_tuning": True}
    | {"floor_scale": 8192, "attn_scale": 0.1},
    (
        RopeKeys(theta=500_000.0, interleaved=True),
        ROPE_LAYERS,
        fields.layer_types_group(
            lambda _, keywords: keywords["rope_layers"], "chunked", "chunked_attention", fields.is_chunked
        ),
        Group(_read_moe_layers, lambda spec: {"moe_layers": moe_layers(spec)}),
        Group(_read_tuning, _write_tuning),
    ),
    fields={
        "intermediate_size": fields.EXPERT_DIM,
        "intermediate_size_mlp": replace(fields.HIDDEN_DIM, keyword="dense_hidden_dim"),
        "use_qk_norm": Field("qk_norm", FLAG, lambda spec: fields.rope_attention(spec).qk_norm == "l2"),
        "attention_chunk_size": Field("chunk", fields.INT_OR_NULL, _chunk),
    },
)
LLAMA4_LAYER = {
    **ATTENTION,
    **PRE_NORMS,
    **{f"feed_forward.{x}_proj": f"mlp.{x}" for x in ("gate", "up", "down")},
    **{f"feed_forward.shared_expert.{x}_proj": f"mlp.shared.{x}" for x in ("gate", "up", "down")},
    "feed_forward.router": "mlp.router",
    "feed_forward.experts.gate_up_proj": rule("mlp.experts.gate", "mlp.experts.up", transposed=True),
    "feed_forward.experts.down_proj": rule("mlp.experts.down", transposed=True),
}
LLAMA4_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", LLAMA4_LAYER)}

# ------------------------------------------------------------------ Llama 3.2 Vision, text side

CROSS_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]


def _read_cross(values: Values, keywords: Keywords) -> Keywords:
    values.only("head_dim", None, keywords["dim"] // keywords["n_heads"])
    layers = values.ints("cross_attention_layers")
    layers = CROSS_LAYERS if layers is None else layers
    return {"cross": tuple(i in layers for i in range(keywords["n_layers"]))}


def _write_cross(spec: Spec) -> Raw:
    return {"cross_attention_layers": [i for i, cross in enumerate(fields.is_cross(spec)) if cross]}


MLLAMA = ConfigTable(
    "mllama",
    fields.defaults(128256, 4096, 14336, 40, 32, 8, 131072, rms_norm_eps=1e-5, cross_attention_layers=None),
    (RopeKeys(theta=500_000.0), Group(_read_cross, _write_cross)),
    # The class never ties its head: its embedding has rows that the head has not.
    fields={"head_dim": None, "tie_word_embeddings": None},
    constants={"tie_word_embeddings": False},
)


def _only(cross: bool, rows: dict[str, str]) -> dict[str, TensorRule]:
    return {disk: rule(ours, cross=cross) for disk, ours in rows.items()}


CROSS = {disk.replace("self_attn", "cross_attn"): ours for disk, ours in {**ATTENTION, **QK_NORMS}.items()}
GATES = {"cross_attn_attn_gate": "attn_gate", "cross_attn_mlp_gate": "mlp_gate"}
MLLAMA_LAYER = {**MLP, **PRE_NORMS, **GATES, **_only(False, ATTENTION), **_only(True, CROSS)}
MLLAMA_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", MLLAMA_LAYER)}

FAMILIES = (
    Family(("llama",), "LlamaForCausalLM", LLAMA, (LLAMA_NAMES,)),
    Family(("smollm3",), "SmolLM3ForCausalLM", SMOLLM3, (LLAMA_NAMES,)),
    Family(("llama4_text",), "Llama4ForCausalLM", LLAMA4, (LLAMA4_NAMES,), wrappers=("llama4",)),
    Family(("mllama_text_model",), "MllamaForCausalLM", MLLAMA, (MLLAMA_NAMES,), wrappers=("mllama",)),
)
