"""OLMo 2 and 3, Cohere 2, gpt-oss and StableLM."""

from __future__ import annotations

from oneblock.store.families import fields
from oneblock.store.families.fields import BIAS, FLAG, NUMBER, ConfigTable, Field
from oneblock.store.families.llama import ATTENTION, LLAMA_NAMES, MLP, OUTER, PRE_NORMS, QK_NORMS
from oneblock.store.families.rope import LayerTypeRopes, RopeKeys
from oneblock.store.name_tables import Family, prefix_names, rule

# ------------------------------------------------------------------ OLMo 2

OLMO2 = ConfigTable(
    "olmo2",
    fields.defaults(50304, 4096, 11008, 32, 32, None, 2048, rms_norm_eps=1e-5, attention_bias=False),
    (RopeKeys(),),
)
OUTPUT_NORMS = {"post_attention_layernorm": "attn_out", "post_feedforward_layernorm": "mlp_out"}
OLMO2_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", {**ATTENTION, **QK_NORMS, **MLP, **OUTPUT_NORMS})}

OLMO3 = ConfigTable(
    "olmo3",
    OLMO2.defaults
    | {"sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 4}
    | {"rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0},
    (LayerTypeRopes(), fields.layer_types_group(fields.every)),
)

# ------------------------------------------------------------------ Cohere 2

COHERE2 = ConfigTable(
    "cohere2",
    fields.defaults(256000, 8192, 22528, 40, 64, None, 8192, layer_norm_eps=1e-5, attention_bias=False)
    | {"tie_word_embeddings": True, "logit_scale": 0.0625, "sliding_window": 4096}
    | {"layer_types": None, "sliding_window_pattern": 4},
    (RopeKeys(interleaved=True), fields.layer_types_group(fields.every)),
)
COHERE2_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", {**ATTENTION, **MLP, "input_layernorm": "attn_in"})}

# ------------------------------------------------------------------ gpt-oss

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 4096}

GPT_OSS = ConfigTable(
    "gpt_oss",
    # hidden_act has no effect in this class
    fields.defaults(201088, 2880, 2880, 36, 64, 8, 131072, rms_norm_eps=1e-5, head_dim=64, hidden_act=...)
    | {"attention_bias": True, "num_experts_per_tok": 4, "num_local_experts": 128, "swiglu_alpha": 1.702}
    | {"swiglu_limit": 7.0, "sliding_window": 128, "layer_types": None},
    (RopeKeys(theta=150_000.0, default=YARN), fields.layer_types_group(fields.alternate)),
    fields={
        "intermediate_size": fields.EXPERT_DIM,
        "swiglu_limit": Field("clamp", NUMBER, fields.of_moe(lambda moe: moe.expert.clamp)),
    },
    only={"swiglu_alpha": (1.702,)},
    constants={"hidden_act": "silu"},
)
GPT_OSS_LAYER = {
    **ATTENTION,
    **PRE_NORMS,
    "self_attn.sinks": "attn.sinks",
    "mlp.router": "mlp.router",
    "mlp.experts.gate_up_proj": rule("mlp.experts.gate", "mlp.experts.up", transposed=True, interleave="per_row"),
    "mlp.experts.gate_up_proj_bias": rule("mlp.experts.gate_bias", "mlp.experts.up_bias", interleave="per_row"),
    "mlp.experts.down_proj": rule("mlp.experts.down", transposed=True),
    "mlp.experts.down_proj_bias": "mlp.experts.down_bias",
}
GPT_OSS_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", GPT_OSS_LAYER)}

# ------------------------------------------------------------------ StableLM

STABLELM = ConfigTable(
    "stablelm",
    fields.defaults(50304, 2560, 6912, 32, 32, 32, 4096, layer_norm_eps=1e-5, head_dim=...)
    | {"use_qkv_bias": False, "use_parallel_residual": False, "qk_layernorm": False},
    (RopeKeys(partial=0.25),),
    fields={
        "use_qkv_bias": Field("qkv_bias", FLAG, BIAS.get),
        "use_parallel_residual": Field("parallel", FLAG, lambda spec: spec.pattern[0].residual == "parallel"),
    },
    only={"qk_layernorm": (False,)},  # it would have one norm per head
)

FAMILIES = (
    Family(("olmo2",), "Olmo2ForCausalLM", OLMO2, (OLMO2_NAMES,)),
    Family(("olmo3",), "Olmo3ForCausalLM", OLMO3, (OLMO2_NAMES,)),
    Family(("cohere2",), "Cohere2ForCausalLM", COHERE2, (COHERE2_NAMES,)),
    Family(("gpt_oss",), "GptOssForCausalLM", GPT_OSS, (GPT_OSS_NAMES,)),
    Family(("stablelm",), "StableLmForCausalLM", STABLELM, (LLAMA_NAMES,)),
)
