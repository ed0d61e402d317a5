"""GPT-1, GPT-2, GPT-Neo, OPT and GPT-NeoX."""

from __future__ import annotations

from dataclasses import replace

from oneblock.errors import OneblockError
from oneblock.spec import Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import FLAG, INT_OR_NULL, KEYS, ConfigTable, Field, Group, Keywords, Raw, Values
from oneblock.store.families.rope import RopeKeys
from oneblock.store.name_tables import Family, prefix_names, rule

# ------------------------------------------------------------------ GPT-1 and GPT-2

GPT1_ACT = fields.activation(
    {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"},
    {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"},
)
RENAMED = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
RENAMED |= {"n_positions": "max_position_embeddings", "num_layers": "num_hidden_layers"}
RENAMED |= {"num_heads": "num_attention_heads"}
GPT_KEYS = {key: replace(KEYS[name], alias=name) for key, name in RENAMED.items()}
GPT = {"n_embd": 768, "n_layer": 12, "n_head": 12, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

GPT1 = ConfigTable(
    "gpt1",
    GPT | {"vocab_size": 40478, "n_positions": 512, "afn": "gelu"},
    fields=GPT_KEYS | {"afn": replace(KEYS["hidden_act"], kind=GPT1_ACT)},
)


def _is_scaled(spec: Spec) -> bool:
    attn = fields.first_attention(spec)
    return attn.scale in (None, attn.head_dim**-0.5)


def _is_scaled_by_depth(spec: Spec) -> bool:
    """Whether layers differ, or the only one writes out the default scale."""
    attn = fields.first_attention(spec)
    return attn.scale == attn.head_dim**-0.5 or attn.scale != spec.layers[-1].attn.scale


GPT2 = ConfigTable(
    "gpt2",
    GPT
    | {"vocab_size": 50257, "n_positions": 1024, "n_inner": None, "activation_function": "gelu_new"}
    | {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    fields=GPT_KEYS
    | {
        "n_inner": replace(fields.HIDDEN_DIM, kind=INT_OR_NULL),
        "scale_attn_weights": Field("scaled", FLAG, _is_scaled),
        "scale_attn_by_inverse_layer_idx": Field("scale_by_depth", FLAG, _is_scaled_by_depth),
    },
    only={"add_cross_attention": (False,)},
)

CONV1D = {
    "attn.c_attn": rule("attn.wq", "attn.wk", "attn.wv", transposed=True),
    "attn.c_proj": rule("attn.wo", transposed=True),
    "mlp.c_fc": rule("mlp.up", transposed=True),
    "mlp.c_proj": rule("mlp.down", transposed=True),
}
GPT1_OUTER = {"transformer.tokens_embed": "embed", "transformer.positions_embed": "positions", "lm_head": "head"}
GPT1_LAYER = {**CONV1D, "ln_1": "attn_out", "ln_2": "mlp_out"}
GPT1_NAMES = {**GPT1_OUTER, **prefix_names("transformer.h.{n}.", GPT1_LAYER)}
GPT2_OUTER = {f"transformer.{x}": ours for x, ours in {"wte": "embed", "wpe": "positions", "ln_f": "norm"}.items()}
GPT2_OUTER |= {"lm_head": "head"}
GPT2_NORMS = {"ln_1": "attn_in", "ln_2": "mlp_in"}
GPT2_NAMES = {**GPT2_OUTER, **prefix_names("transformer.h.{n}.", {**CONV1D, **GPT2_NORMS})}

# ------------------------------------------------------------------ GPT-Neo


def _read_attention_types(values: Values, keywords: Keywords) -> Keywords:
    """[[["global", "local"], 12]]: kinds of layers, and how often they are repeated."""
    n_layers, groups = keywords["n_layers"], values.get("attention_types") or NEO.defaults["attention_types"]
    is_valid = all(isinstance(kinds, list) and {*kinds} <= {"global", "local"} for kinds, _ in groups)
    if not is_valid or sum(len(kinds) * times for kinds, times in groups) != n_layers:
        raise OneblockError(f"attention_types must give global or local to {n_layers} layers; fix it")
    return {"sliding": tuple(kind == "local" for kinds, times in groups for kind in kinds * times)}


def _write_attention_types(spec: Spec) -> Raw:
    return {"attention_types": [[["local" if slides else "global" for slides in fields.is_sliding(spec)], 1]]}


NEO = ConfigTable(
    "gpt_neo",
    {"vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 2048, "num_layers": 24, "num_heads": 16}
    | {"attention_types": [[["global", "local"], 12]], "intermediate_size": None, "window_size": 256}
    | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    (Group(_read_attention_types, _write_attention_types),),
    fields=GPT_KEYS
    | {
        "intermediate_size": replace(fields.HIDDEN_DIM, kind=INT_OR_NULL),
        "window_size": replace(fields.WINDOW, kind=fields.INT),
    },
)
NEO_LAYER = {
    **GPT2_NORMS,
    **{f"attn.attention.{x}_proj": f"attn.w{x}" for x in "qkv"},
    "attn.attention.out_proj": "attn.wo",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
NEO_NAMES = {**GPT2_OUTER, **prefix_names("transformer.h.{n}.", NEO_LAYER)}

# ------------------------------------------------------------------ OPT


def _read_projection(values: Values, keywords: Keywords) -> Keywords:
    values.only("word_embed_proj_dim", keywords["dim"], None)
    return {}


OPT = ConfigTable(
    "opt",
    {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072}
    | {"max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False}
    | {"word_embed_proj_dim": None, "num_attention_heads": 12, "activation_function": "relu", "enable_bias": True}
    | {"layer_norm_elementwise_affine": True, "tie_word_embeddings": True},
    (Group(_read_projection, lambda spec: {"word_embed_proj_dim": spec.dim}),),
    fields={
        "ffn_dim": fields.HIDDEN_DIM,
        "activation_function": KEYS["hidden_act"],
        "enable_bias": Field("bias", FLAG, fields.BIAS.get),
        "do_layer_norm_before": Field("pre_norm", FLAG, lambda spec: spec.pattern[0].residual == "pre"),
        "_remove_final_layer_norm": Field(
            "final_norm", fields.NOT_FLAG, lambda spec: spec.final_norm or spec.pattern[0].residual != "pre"
        ),
    },
    only={"layer_norm_elementwise_affine": (True,)},
)

OPT_LAYER = {f"self_attn.{x}_proj": f"attn.w{x}" for x in "qkv"}
OPT_LAYER |= {"self_attn.out_proj": "attn.wo", "fc1": "mlp.up", "fc2": "mlp.down"}
OPT_OUTER = {
    **{f"model.decoder.embed_{x}": ours for x, ours in (("tokens", "embed"), ("positions", "positions"))},
    "model.decoder.final_layer_norm": "norm",
    "lm_head": "head",
}
# The same names stand for the norms of pre-norm and of post-norm layers.
OPT_NAMES, OPT_POST_NAMES = (
    {**OPT_OUTER, **prefix_names("model.decoder.layers.{n}.", {**OPT_LAYER, **norms})}
    for norms in (
        {"self_attn_layer_norm": "attn_in", "final_layer_norm": "mlp_in"},
        {"self_attn_layer_norm": "attn_out", "final_layer_norm": "mlp_out"},
    )
)

# ------------------------------------------------------------------ GPT-NeoX

NEOX = ConfigTable(
    "gpt_neox",
    {"vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64}
    | {"intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5}
    | {"tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True},
    (RopeKeys(partial=0.25, theta_key="rotary_emb_base", partial_key="rotary_pct"),),
    fields={"use_parallel_residual": Field("parallel", FLAG, lambda spec: spec.pattern[0].residual == "parallel_two")},
)
NEOX_LAYER = {
    "input_layernorm": "attn_in",
    "post_attention_layernorm": "mlp_in",
    "attention.query_key_value": rule("attn.wq", "attn.wk", "attn.wv", interleave="per_head"),
    "attention.dense": "attn.wo",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
NEOX_OUTER = {"gpt_neox.embed_in": "embed", "gpt_neox.final_layer_norm": "norm", "embed_out": "head"}
NEOX_NAMES = {**NEOX_OUTER, **prefix_names("gpt_neox.layers.{n}.", NEOX_LAYER)}

MASKS = ("attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "position_ids")  # older buffers

FAMILIES = (
    Family(("gpt2",), "GPT2LMHeadModel", GPT2, (GPT2_NAMES,), "transformer.", MASKS),
    Family(("openai-gpt",), "OpenAIGPTLMHeadModel", GPT1, (GPT1_NAMES,), "transformer.", MASKS),
    Family(("gpt_neo",), "GPTNeoForCausalLM", NEO, (NEO_NAMES,), "transformer.", MASKS),
    Family(("opt",), "OPTForCausalLM", OPT, (OPT_NAMES, OPT_POST_NAMES)),
    Family(("gpt_neox",), "GPTNeoXForCausalLM", NEOX, (NEOX_NAMES,), "gpt_neox.", MASKS),
)
