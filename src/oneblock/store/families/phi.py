"""Phi-1.5 and 2; Phi-3, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from oneblock.spec import FAMILIES as BUILD
from oneblock.spec import LongRope, Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import Fields, Raw
from oneblock.store.families.llama import OUTER, PRE_NORMS, head_dim
from oneblock.store.families.mistral import write_mistral
from oneblock.store.families.rope import read_rope, write_rope
from oneblock.store.name_tables import Family, prefix_names, rule

PHI = fields.SIZES | {"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
PHI |= {"num_attention_heads": 32, "hidden_act": "gelu_new", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5}
PHI |= {"qk_layernorm": False}
PHI3 = fields.SIZES | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
PHI3 |= {"num_attention_heads": 32, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
PHI3 |= {"rms_norm_eps": 1e-5, "sliding_window": None}


def read_phi(raw: Raw) -> Spec:
    f = Fields(raw, PHI)
    common = fields.sizes(f, eps="layer_norm_eps")
    return BUILD["phi"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common), partial=0.5),
        qk_norm=f.flag("qk_layernorm"),
    )


def write_phi(spec: Spec) -> Raw:
    attn = spec.layers[0].attn
    return {
        **fields.sizes_written(spec, eps="layer_norm_eps"),
        "intermediate_size": fields.some_mlp(spec).hidden_dim,
        "rope_parameters": {"partial_rotary_factor": 1.0, **write_rope(attn.rope, attn.head_dim)},
        "qk_layernorm": attn.qk_norm == "head",
    }


def read_phi3(raw: Raw) -> Spec:
    for key in ("rope_scaling", "rope_parameters"):  # two older names of the one scaling the class has
        rope = raw.get(key)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            raw = {**raw, key: {**rope, "rope_type": "longrope"}}
    f = Fields(raw, PHI3)
    common = fields.sizes(f)
    return BUILD["phi3"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common), partial=1.0, types=("default", "longrope")),
        window=f.whole_or_none("sliding_window"),
    )


def write_phi3(spec: Spec) -> Raw:
    rope = spec.layers[0].attn.rope
    scaling = rope.scaling if rope else None
    before = scaling.original_context if isinstance(scaling, LongRope) else spec.context
    return {**write_mistral(spec), "original_max_position_embeddings": before}


PHI_LAYER = {
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.dense": "attn.wo",
    "self_attn.q_layernorm": "attn.q_norm",
    "self_attn.k_layernorm": "attn.k_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
    "input_layernorm": "attn_in",
}
PHI_NAMES = {
    "model.embed_tokens": "embed",
    "model.final_layernorm": "norm",
    "lm_head": "head",
    **prefix_names("model.layers.{n}.", PHI_LAYER),
}
PHI3_LAYER = {
    "self_attn.qkv_proj": rule("attn.wq", "attn.wk", "attn.wv"),
    "self_attn.o_proj": "attn.wo",
    "mlp.gate_up_proj": rule("mlp.gate", "mlp.up"),
    "mlp.down_proj": "mlp.down",
    **PRE_NORMS,
}
PHI3_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", PHI3_LAYER)}

FAMILIES = (
    Family(("phi",), "PhiForCausalLM", read_phi, write_phi, (PHI_NAMES,)),
    Family(("phi3",), "Phi3ForCausalLM", read_phi3, write_phi3, (PHI3_NAMES,)),
)
