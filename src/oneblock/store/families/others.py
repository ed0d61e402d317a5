"""OLMo 2, Cohere 2 and gpt-oss."""

from __future__ import annotations

from oneblock.spec import FAMILIES as BUILD
from oneblock.spec import Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import Fields, Raw
from oneblock.store.families.llama import ATTENTION, MLP, OUTER, PRE_NORMS, QK_NORMS, head_dim
from oneblock.store.families.rope import read_rope, write_rope
from oneblock.store.name_tables import Family, prefix_names, rule

# ------------------------------------------------------------------ OLMo 2

OLMO2 = fields.SIZES | {"vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
OLMO2 |= {"num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False}


def read_olmo2(raw: Raw) -> Spec:
    f = Fields(raw, OLMO2)
    common = fields.sizes(f)
    rope, bias = read_rope(f, head_dim(common)), f.flag("attention_bias")
    return BUILD["olmo2"](**common, hidden_dim=f.whole("intermediate_size"), rope=rope, attention_bias=bias)


def write_olmo2(spec: Spec) -> Raw:
    attn = spec.layers[0].attn
    return {
        **fields.sizes_written(spec),
        "intermediate_size": fields.some_mlp(spec).hidden_dim,
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "attention_bias": attn.bias[0],
    }


OUTPUT_NORMS = {"post_attention_layernorm": "attn_out", "post_feedforward_layernorm": "mlp_out"}
OLMO2_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", {**ATTENTION, **QK_NORMS, **MLP, **OUTPUT_NORMS})}

# ------------------------------------------------------------------ Cohere 2

COHERE2 = fields.SIZES | {"vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625}
COHERE2 |= {"num_hidden_layers": 40, "num_attention_heads": 64, "max_position_embeddings": 8192}
COHERE2 |= {"layer_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 4096}
COHERE2 |= {"layer_types": None, "sliding_window_pattern": 4}


def read_cohere2(raw: Raw) -> Spec:
    f = Fields(raw, COHERE2)
    common, every = fields.sizes(f, eps="layer_norm_eps"), f.whole("sliding_window_pattern")
    kinds = f.kinds("full_attention", "sliding_attention")
    kinds = kinds or ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(common["n_layers"])]
    return BUILD["cohere2"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        rope=read_rope(f, head_dim(common), interleaved=True),
        window=f.whole_or_none("sliding_window"),
        sliding=tuple(kind == "sliding_attention" for kind in kinds),
        attention_bias=f.flag("attention_bias"),
        logit_scale=f.number("logit_scale"),
    )


def write_cohere2(spec: Spec) -> Raw:
    attn = next((layer.attn for layer in spec.layers if layer.attn.rope), spec.layers[0].attn)
    return {
        **fields.sizes_written(spec, eps="layer_norm_eps"),
        "intermediate_size": fields.some_mlp(spec).hidden_dim,
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "sliding_window": fields.window_of(spec),
        "layer_types": fields.sliding_kinds(spec),
        "attention_bias": attn.bias[0],
        "logit_scale": spec.logit_scale,
    }


COHERE2_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", {**ATTENTION, **MLP, "input_layernorm": "attn_in"})}

# ------------------------------------------------------------------ gpt-oss

GPT_OSS = fields.SIZES | {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64}
GPT_OSS |= {"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128}
GPT_OSS |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_local_experts": 128, "layer_types": None}
GPT_OSS |= {"num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True}
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 4096}


def read_gpt_oss(raw: Raw) -> Spec:
    if raw.get("rope_parameters") is None and not raw.get("rope_scaling"):
        raw = {**raw, "rope_parameters": YARN}
    f = Fields(raw, GPT_OSS)
    f.only("swiglu_alpha", 1.702)
    common, kinds = fields.sizes(f), f.kinds("full_attention", "sliding_attention")
    depth = common["n_layers"]
    sliding = [kind == "sliding_attention" for kind in kinds] if kinds else [i % 2 == 0 for i in range(depth)]
    keywords = common | {"act": "quick_gelu"}  # hidden_act has no effect
    return BUILD["gpt_oss"](
        **keywords,
        hidden_dim=f.whole("intermediate_size"),
        n_experts=f.whole("num_local_experts", "num_experts"),
        top_k=f.whole("num_experts_per_tok"),
        clamp=f.number("swiglu_limit"),
        rope=read_rope(f, head_dim(common), theta=150_000.0),
        window=f.whole_or_none("sliding_window"),
        sliding=tuple(sliding),
        attention_bias=f.flag("attention_bias"),
    )


def write_gpt_oss(spec: Spec) -> Raw:
    attn, moe = spec.layers[0].attn, fields.some_moe(spec)
    limit = {} if moe.expert.clamp is None else {"swiglu_limit": moe.expert.clamp}
    return {
        **fields.sizes_written(spec),
        "hidden_act": "silu",
        "intermediate_size": moe.expert.hidden_dim,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        **limit,
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "sliding_window": fields.window_of(spec),
        "layer_types": fields.sliding_kinds(spec),
        "attention_bias": attn.bias[0],
    }


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

FAMILIES = (
    Family(("olmo2",), "Olmo2ForCausalLM", read_olmo2, write_olmo2, (OLMO2_NAMES,)),
    Family(("cohere2",), "Cohere2ForCausalLM", read_cohere2, write_cohere2, (COHERE2_NAMES,)),
    Family(("gpt_oss",), "GptOssForCausalLM", read_gpt_oss, write_gpt_oss, (GPT_OSS_NAMES,)),
)
