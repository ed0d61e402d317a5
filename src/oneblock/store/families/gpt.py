"""GPT-1, GPT-2, GPT-Neo, OPT and GPT-NeoX."""

from __future__ import annotations

from typing import Any

from oneblock.spec import FAMILIES as BUILD
from oneblock.spec import Spec
from oneblock.store.families.fields import ACT_NAMES, Fields, Raw, some_mlp, window_of
from oneblock.store.families.rope import read_rope, write_rope
from oneblock.store.name_tables import Family, prefix_names, rule

QKV = rule("attn.wq", "attn.wk", "attn.wv", transposed=True)

# ------------------------------------------------------------------ GPT-1 and GPT-2

GPT1: dict[str, Any] = {"vocab_size": 40478, "n_positions": 512, "n_embd": 768, "n_layer": 12, "n_head": 12}
GPT1 |= {"afn": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
GPT1_ACTS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
GPT2 = GPT1 | {"vocab_size": 50257, "n_positions": 1024, "n_inner": None, "activation_function": "gelu_new"}
GPT2 |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def _gpt(f: Fields) -> dict[str, Any]:
    return {
        "vocab": f.whole("vocab_size"),
        "dim": f.whole("n_embd", "hidden_size"),
        "n_layers": f.whole("n_layer", "num_hidden_layers"),
        "n_heads": f.whole("n_head", "num_attention_heads"),
        "context": f.whole("n_positions", "max_position_embeddings"),
        "norm_eps": f.number("layer_norm_epsilon"),
        "tied": f.flag("tie_word_embeddings"),
    }


def _gpt_written(spec: Spec) -> Raw:
    return {
        "vocab_size": spec.vocab,
        "n_embd": spec.dim,
        "n_layer": spec.n_layers,
        "n_head": spec.layers[0].attn.n_heads,
        "n_positions": spec.context,
        "layer_norm_epsilon": spec.norm.eps,
        "tie_word_embeddings": spec.tied,
    }


def read_gpt1(raw: Raw) -> Spec:
    f = Fields(raw, GPT1)
    return BUILD["gpt1"](**_gpt(f), act=f.act("afn", GPT1_ACTS))


def write_gpt1(spec: Spec) -> Raw:
    return {**_gpt_written(spec), "afn": {"gelu_tanh": "gelu"}.get(some_mlp(spec).act, some_mlp(spec).act)}


def read_gpt2(raw: Raw) -> Spec:
    f = Fields(raw, GPT2)
    f.only("add_cross_attention", False)
    return BUILD["gpt2"](
        **_gpt(f),
        hidden_dim=f.whole_or_none("n_inner"),
        act=f.act("activation_function"),
        scaled=f.flag("scale_attn_weights"),
        scale_by_depth=f.flag("scale_attn_by_inverse_layer_idx"),
    )


def write_gpt2(spec: Spec) -> Raw:
    mlp, attn = some_mlp(spec), spec.layers[0].attn
    return {
        **_gpt_written(spec),
        "n_inner": mlp.hidden_dim,
        "activation_function": _new(mlp.act),
        "scale_attn_weights": attn.scale in (None, attn.head_dim**-0.5),
        "scale_attn_by_inverse_layer_idx": attn.scale != spec.layers[-1].attn.scale,
    }


def _new(act: str) -> str:
    return "gelu_new" if act == "gelu_tanh" else ACT_NAMES[act]


CONV1D = {
    "attn.c_attn": QKV,
    "attn.c_proj": rule("attn.wo", transposed=True),
    "mlp.c_fc": rule("mlp.up", transposed=True),
    "mlp.c_proj": rule("mlp.down", transposed=True),
}
GPT1_NAMES = {
    "transformer.tokens_embed": "embed",
    "transformer.positions_embed": "positions",
    "lm_head": "head",
    **prefix_names("transformer.h.{n}.", {**CONV1D, "ln_1": "attn_out", "ln_2": "mlp_out"}),
}
GPT2_NAMES = {
    "transformer.wte": "embed",
    "transformer.wpe": "positions",
    "transformer.ln_f": "norm",
    "lm_head": "head",
    **prefix_names("transformer.h.{n}.", {**CONV1D, "ln_1": "attn_in", "ln_2": "mlp_in"}),
}

# ------------------------------------------------------------------ GPT-Neo

NEO: dict[str, Any] = {"vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": 2048, "num_layers": 24}
NEO |= {"attention_types": [[["global", "local"], 12]], "num_heads": 16, "intermediate_size": None, "window_size": 256}
NEO |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}


def read_gpt_neo(raw: Raw) -> Spec:
    f = Fields(raw, NEO)
    kinds = [kind for group, times in f.get("attention_types") or NEO["attention_types"] for kind in group * times]
    n_layers = f.whole("num_layers", "num_hidden_layers")
    f.raw = {**raw, "num_hidden_layers": n_layers, "layer_types": kinds}
    f.kinds("global", "local")
    return BUILD["gpt_neo"](
        vocab=f.whole("vocab_size"),
        dim=f.whole("hidden_size"),
        n_layers=n_layers,
        n_heads=f.whole("num_heads", "num_attention_heads"),
        hidden_dim=f.whole_or_none("intermediate_size"),
        context=f.whole("max_position_embeddings"),
        norm_eps=f.number("layer_norm_epsilon"),
        act=f.act("activation_function"),
        window=f.whole("window_size"),
        sliding=tuple(kind == "local" for kind in kinds),
        tied=f.flag("tie_word_embeddings"),
    )


def write_gpt_neo(spec: Spec) -> Raw:
    kinds = ["local" if layer.attn.window else "global" for layer in spec.layers]
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "num_layers": spec.n_layers,
        "num_heads": spec.layers[0].attn.n_heads,
        "intermediate_size": some_mlp(spec).hidden_dim,
        "max_position_embeddings": spec.context,
        "layer_norm_epsilon": spec.norm.eps,
        "activation_function": _new(some_mlp(spec).act),
        "window_size": window_of(spec) or NEO["window_size"],
        "attention_types": [[kinds, 1]],
        "tie_word_embeddings": spec.tied,
    }


NEO_NAMES = {
    "transformer.wte": "embed",
    "transformer.wpe": "positions",
    "transformer.ln_f": "norm",
    "lm_head": "head",
    **prefix_names(
        "transformer.h.{n}.",
        {
            "ln_1": "attn_in",
            "ln_2": "mlp_in",
            "attn.attention.q_proj": "attn.wq",
            "attn.attention.k_proj": "attn.wk",
            "attn.attention.v_proj": "attn.wv",
            "attn.attention.out_proj": "attn.wo",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
        },
    ),
}

# ------------------------------------------------------------------ OPT

OPT: dict[str, Any] = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072}
OPT |= {"max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False}
OPT |= {"word_embed_proj_dim": None, "num_attention_heads": 12, "activation_function": "relu", "enable_bias": True}
OPT |= {"layer_norm_elementwise_affine": True, "tie_word_embeddings": True}


def read_opt(raw: Raw) -> Spec:
    f = Fields(raw, OPT)
    dim = f.whole("hidden_size")
    f.only("word_embed_proj_dim", dim, None)
    f.only("layer_norm_elementwise_affine", True)
    return BUILD["opt"](
        vocab=f.whole("vocab_size"),
        dim=dim,
        n_layers=f.whole("num_hidden_layers"),
        n_heads=f.whole("num_attention_heads"),
        hidden_dim=f.whole("ffn_dim"),
        context=f.whole("max_position_embeddings"),
        act=f.act("activation_function"),
        bias=f.flag("enable_bias"),
        pre_norm=f.flag("do_layer_norm_before"),
        final_norm=not f.flag("_remove_final_layer_norm"),
        tied=f.flag("tie_word_embeddings"),
    )


def write_opt(spec: Spec) -> Raw:
    layer = spec.layers[0]
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "word_embed_proj_dim": spec.dim,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": layer.attn.n_heads,
        "ffn_dim": some_mlp(spec).hidden_dim,
        "max_position_embeddings": spec.context,
        "activation_function": ACT_NAMES[some_mlp(spec).act],
        "enable_bias": layer.attn.bias[0],
        "do_layer_norm_before": layer.residual == "pre",
        "_remove_final_layer_norm": layer.residual == "pre" and not spec.final_norm,
        "tie_word_embeddings": spec.tied,
    }


OPT_LAYER = {
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.out_proj": "attn.wo",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
}
OPT_NAMES = {
    "model.decoder.embed_tokens": "embed",
    "model.decoder.embed_positions": "positions",
    "model.decoder.final_layer_norm": "norm",
    "lm_head": "head",
    **prefix_names("model.decoder.layers.{n}.", OPT_LAYER),
    # Each of these stands once for a layer that norms before and once for one that norms after.
    "model.decoder.layers.{n}.self_attn_layer_norm": rule("blocks.{n}.attn_in"),
    "model.decoder.layers.{n}.final_layer_norm": rule("blocks.{n}.mlp_in"),
}
OPT_POST_NAMES = OPT_NAMES | {
    "model.decoder.layers.{n}.self_attn_layer_norm": rule("blocks.{n}.attn_out"),
    "model.decoder.layers.{n}.final_layer_norm": rule("blocks.{n}.mlp_out"),
}

# ------------------------------------------------------------------ GPT-NeoX

NEOX: dict[str, Any] = {"vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64}
NEOX |= {"intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5}
NEOX |= {"tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True}


def read_gpt_neox(raw: Raw) -> Spec:
    f = Fields(raw, NEOX)
    dim, n_heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    rope = read_rope(f, dim // n_heads, partial=0.25, theta_key="rotary_emb_base", partial_key="rotary_pct")
    return BUILD["gpt_neox"](
        vocab=f.whole("vocab_size"),
        dim=dim,
        n_layers=f.whole("num_hidden_layers"),
        n_heads=n_heads,
        hidden_dim=f.whole("intermediate_size"),
        context=f.whole("max_position_embeddings"),
        norm_eps=f.number("layer_norm_eps"),
        act=f.act("hidden_act"),
        rope=rope,
        attention_bias=f.flag("attention_bias"),
        parallel=f.flag("use_parallel_residual"),
        tied=f.flag("tie_word_embeddings"),
    )


def write_gpt_neox(spec: Spec) -> Raw:
    layer = spec.layers[0]
    rope = write_rope(layer.attn.rope, layer.attn.head_dim)
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": layer.attn.n_heads,
        "intermediate_size": some_mlp(spec).hidden_dim,
        "hidden_act": ACT_NAMES[some_mlp(spec).act],
        "max_position_embeddings": spec.context,
        "layer_norm_eps": spec.norm.eps,
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope},
        "attention_bias": layer.attn.bias[0],
        "use_parallel_residual": layer.residual == "parallel_two",
        "tie_word_embeddings": spec.tied,
    }


NEOX_NAMES = {
    "gpt_neox.embed_in": "embed",
    "gpt_neox.final_layer_norm": "norm",
    "embed_out": "head",
    **prefix_names(
        "gpt_neox.layers.{n}.",
        {
            "input_layernorm": "attn_in",
            "post_attention_layernorm": "mlp_in",
            "attention.query_key_value": rule("attn.wq", "attn.wk", "attn.wv", interleave="per_head"),
            "attention.dense": "attn.wo",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        },
    ),
}

MASKS = ("attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "position_ids")  # once stored

FAMILIES = (
    Family(("gpt2",), "GPT2LMHeadModel", read_gpt2, write_gpt2, (GPT2_NAMES,), "transformer.", MASKS),
    Family(("openai-gpt",), "OpenAIGPTLMHeadModel", read_gpt1, write_gpt1, (GPT1_NAMES,), "transformer.", MASKS),
    Family(("gpt_neo",), "GPTNeoForCausalLM", read_gpt_neo, write_gpt_neo, (NEO_NAMES,), "transformer.", MASKS),
    Family(("opt",), "OPTForCausalLM", read_opt, write_opt, (OPT_NAMES, OPT_POST_NAMES)),
    Family(("gpt_neox",), "GPTNeoXForCausalLM", read_gpt_neox, write_gpt_neox, (NEOX_NAMES,), "gpt_neox.", MASKS),
)
