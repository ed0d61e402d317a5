"""Qwen2 and 2.5, Qwen3, and their mixtures of experts."""

from __future__ import annotations

from typing import Any

from oneblock.spec import FAMILIES as BUILD
from oneblock.spec import Moe, Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import Fields, Raw
from oneblock.store.families.llama import LAYER, LLAMA_NAMES, OUTER, QK_NORMS, head_dim
from oneblock.store.families.mistral import FUSED_EXPERTS
from oneblock.store.families.rope import read_rope, write_rope
from oneblock.store.name_tables import Family, expert_names, prefix_names

QWEN2 = fields.SIZES | {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "rms_norm_eps": 1e-6}
QWEN2 |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "layer_types": None}
QWEN2 |= {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
QWEN2 |= {"max_window_layers": 28}
QWEN3 = QWEN2 | {"head_dim": 128, "attention_bias": False}
MOE: dict[str, Any] = {"decoder_sparse_step": 1, "norm_topk_prob": False, "mlp_only_layers": None, "hidden_size": 2048}
QWEN2_MOE = QWEN2 | MOE | {"intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
QWEN2_MOE |= {"num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
QWEN2_MOE |= {"num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True}
QWEN3_MOE = QWEN2 | MOE | {"intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4}
QWEN3_MOE |= {"attention_bias": False, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128}


def _window(f: Fields) -> int | None:
    if not f.flag("use_sliding_window"):
        return None
    return None if f.get("sliding_window") in (None, 0) else f.whole("sliding_window")


def _sliding(f: Fields) -> tuple[bool, ...]:
    """Layers from max_window_layers on, unless layer_types says which."""
    kinds, first = f.kinds("full_attention", "sliding_attention"), f.get("max_window_layers")
    depth = f.whole("num_hidden_layers")
    return tuple(k == "sliding_attention" for k in kinds) if kinds else tuple(i >= first for i in range(depth))


def _read_dense(raw: Raw, family: str, defaults: Raw, **more: Any) -> Spec:
    f = Fields(raw, defaults)
    common = fields.sizes(f)
    return BUILD[family](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common)),
        window=_window(f),
        sliding=_sliding(f),
        **more,
    )


def read_qwen2(raw: Raw) -> Spec:
    return _read_dense(raw, "qwen2", QWEN2)


def read_qwen3(raw: Raw) -> Spec:
    return _read_dense(raw, "qwen3", QWEN3, attention_bias=Fields(raw, QWEN3).flag("attention_bias"))


def write_qwen2(spec: Spec) -> Raw:
    attn, window = fields.full_attention(spec), fields.window_of(spec)
    return {
        **fields.sizes_written(spec),
        "intermediate_size": fields.some_mlp(spec).hidden_dim,
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": fields.sliding_kinds(spec),
    }


def write_qwen3(spec: Spec) -> Raw:
    return {**write_qwen2(spec), "attention_bias": spec.layers[0].attn.bias[0]}


# ------------------------------------------------------------------ mixtures of experts


def _sparse(f: Fields) -> tuple[bool, ...]:
    step, dense = f.whole("decoder_sparse_step"), f.layers("mlp_only_layers") or []
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(f.whole("num_hidden_layers")))


def _read_moe(f: Fields, family: str, **more: Any) -> Spec:
    common = fields.sizes(f)
    return BUILD[family](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        expert_hidden_dim=f.whole("moe_intermediate_size"),
        n_experts=f.whole("num_experts", "num_local_experts"),
        top_k=f.whole("num_experts_per_tok"),
        rope=read_rope(f, head_dim(common)),
        window=_window(f),
        sparse=_sparse(f),
        renormalize=f.flag("norm_topk_prob"),
        **more,
    )


def read_qwen2_moe(raw: Raw) -> Spec:
    f = Fields(raw, QWEN2_MOE)
    kinds, below = f.kinds("full_attention", "sliding_attention"), f.get("max_window_layers")
    depth = f.whole("num_hidden_layers")
    # Unlike Qwen2, the even layers below max_window_layers slide.
    sliding = [k == "sliding_attention" for k in kinds] if kinds else [i % 2 == 0 and i < below for i in range(depth)]
    shared, bias = f.whole("shared_expert_intermediate_size"), f.flag("qkv_bias")
    return _read_moe(f, "qwen2_moe", sliding=tuple(sliding), shared_hidden_dim=shared, qkv_bias=bias)


def read_qwen3_moe(raw: Raw) -> Spec:
    f = Fields(raw, QWEN3_MOE)
    return _read_moe(f, "qwen3_moe", attention_bias=f.flag("attention_bias"))


def _moe_written(spec: Spec, intermediate_size: int) -> Raw:
    moe, attn = fields.some_moe(spec), fields.full_attention(spec)
    return {
        **fields.sizes_written(spec),
        "intermediate_size": fields.dense_hidden(spec, intermediate_size),
        "moe_intermediate_size": moe.expert.hidden_dim,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalize,
        "mlp_only_layers": [i for i, layer in enumerate(spec.layers) if not isinstance(layer.mlp, Moe)],
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "use_sliding_window": fields.window_of(spec) is not None,
        "sliding_window": fields.window_of(spec),
    }


def write_qwen2_moe(spec: Spec) -> Raw:
    shared = fields.some_moe(spec).shared
    return {
        **_moe_written(spec, QWEN2_MOE["intermediate_size"]),
        "shared_expert_intermediate_size": shared.hidden_dim if shared else 0,
        "qkv_bias": spec.layers[0].attn.bias[0],
        "layer_types": fields.sliding_kinds(spec),
    }


def write_qwen3_moe(spec: Spec) -> Raw:
    return {**_moe_written(spec, QWEN3_MOE["intermediate_size"]), "attention_bias": spec.layers[0].attn.bias[0]}


QK_NORMED = {**OUTER, **prefix_names("model.layers.{n}.", {**LAYER, **QK_NORMS})}
MOE_LAYER = {
    **LAYER,
    **QK_NORMS,
    "mlp.gate": "mlp.router",
    "mlp.shared_expert.gate_proj": "mlp.shared.gate",
    "mlp.shared_expert.up_proj": "mlp.shared.up",
    "mlp.shared_expert.down_proj": "mlp.shared.down",
    "mlp.shared_expert_gate": "mlp.shared_gate",
}
MOE_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", {**MOE_LAYER, **expert_names("mlp.experts")})}
MOE_FUSED = {**OUTER, **prefix_names("model.layers.{n}.", {**MOE_LAYER, **FUSED_EXPERTS})}

FAMILIES = (
    Family(("qwen2",), "Qwen2ForCausalLM", read_qwen2, write_qwen2, (LLAMA_NAMES,)),
    Family(("qwen2_moe",), "Qwen2MoeForCausalLM", read_qwen2_moe, write_qwen2_moe, (MOE_NAMES, MOE_FUSED)),
    Family(("qwen3",), "Qwen3ForCausalLM", read_qwen3, write_qwen3, (QK_NORMED,)),
    Family(("qwen3_moe",), "Qwen3MoeForCausalLM", read_qwen3_moe, write_qwen3_moe, (MOE_NAMES, MOE_FUSED)),
)
