"""Phi-1.5 and 2; Phi-3, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from oneblock.spec import LongRope, Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import FLAG, ConfigTable, Field, Group, Raw
from oneblock.store.families.llama import OUTER, PRE_NORMS
from oneblock.store.families.rope import RopeKeys
from oneblock.store.name_tables import Family, prefix_names, rule

PHI = ConfigTable(
    "phi",
    fields.defaults(51200, 2048, 8192, 24, 32, None, 2048, layer_norm_eps=1e-5, hidden_act="gelu_new")
    | {"qk_layernorm": False},
    (RopeKeys(partial=0.5),),
    fields={"qk_layernorm": Field("qk_norm", FLAG, lambda spec: fields.first_attention(spec).qk_norm == "head")},
)


def _write_original_context(spec: Spec) -> Raw:
    rope = fields.first_attention(spec).rope
    scaling = rope.scaling if rope else None
    context = scaling.original_context if isinstance(scaling, LongRope) else spec.context
    return {"original_max_position_embeddings": context}


PHI3 = ConfigTable(
    "phi3",
    fields.defaults(32064, 3072, 8192, 32, 32, None, 4096, rms_norm_eps=1e-5, sliding_window=None)
    | {"original_max_position_embeddings": 4096},
    (
        # "su" and "yarn" are older names of the one scaling that the class has
        RopeKeys(partial=1.0, types=("default", "longrope"), renamed={"su": "longrope", "yarn": "longrope"}),
        Group(lambda values, keywords: {}, _write_original_context),
    ),
)

PHI_LAYER = {
    **{f"self_attn.{x}_proj": f"attn.w{x}" for x in "qkv"},
    **{f"self_attn.{x}_layernorm": f"attn.{x}_norm" for x in "qk"},
    "self_attn.dense": "attn.wo",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
    "input_layernorm": "attn_in",
}
PHI_OUTER = {"model.embed_tokens": "embed", "model.final_layernorm": "norm", "lm_head": "head"}
PHI_NAMES = {**PHI_OUTER, **prefix_names("model.layers.{n}.", PHI_LAYER)}
PHI3_LAYER = {
    "self_attn.qkv_proj": rule("attn.wq", "attn.wk", "attn.wv"),
    "self_attn.o_proj": "attn.wo",
    "mlp.gate_up_proj": rule("mlp.gate", "mlp.up"),
    "mlp.down_proj": "mlp.down",
    **PRE_NORMS,
}
PHI3_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", PHI3_LAYER)}

FAMILIES = (
    Family(("phi",), "PhiForCausalLM", PHI, (PHI_NAMES,)),
    Family(("phi3",), "Phi3ForCausalLM", PHI3, (PHI3_NAMES,)),
)
