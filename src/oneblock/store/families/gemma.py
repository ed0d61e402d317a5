"""Gemma 1, 2 and 3."""

from __future__ import annotations

from oneblock.spec import Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import NUMBER, NUMBER_OR_NULL, ConfigTable, Field
from oneblock.store.families.llama import ATTENTION, LLAMA_NAMES, MLP, OUTER, QK_NORMS
from oneblock.store.families.rope import LayerTypeRopes, RopeKeys
from oneblock.store.name_tables import Family, prefix_names

CAUSAL = {"use_bidirectional_attention": (None, False)}
# The first uploads say "gelu" and mean the tanh form.
GEMMA_ACT = fields.activation(fields.ACTS | {"gelu": "gelu_tanh"}, fields.ACT_WRITTEN)

GEMMA = ConfigTable(
    "gemma",
    fields.defaults(256000, 3072, 24576, 28, 16, 16, 8192, rms_norm_eps=1e-6, head_dim=256, attention_bias=False)
    | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "use_bidirectional_attention": None},
    (RopeKeys(),),
    fields={"hidden_act": Field("act", GEMMA_ACT, lambda spec: fields.first_mlp(spec).act)},
    only=CAUSAL,
)


def _query_scalar(spec: Spec) -> int:
    attn = fields.first_attention(spec)
    return attn.head_dim if attn.scale is None else round(attn.scale**-2)


SCALAR = {"query_pre_attn_scalar": Field("query_scalar", NUMBER, _query_scalar)}
SOFTCAP = Field("softcap", NUMBER_OR_NULL, lambda spec: fields.first_attention(spec).softcap)
SLIDING = {"hidden_act": ..., "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
SLIDING |= {"head_dim": 256, "attention_bias": False, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256}
SLIDING |= {"sliding_window": 4096, "layer_types": None, "use_bidirectional_attention": None}
GEMMA2 = ConfigTable(
    "gemma2",
    fields.defaults(256000, 2304, 9216, 26, 8, 4, 8192, **SLIDING)
    | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    (RopeKeys(), fields.layer_types_group(fields.alternate)),
    fields=SCALAR | {"attn_logit_softcapping": SOFTCAP},
    only=CAUSAL,
)


GEMMA3 = ConfigTable(
    "gemma3",
    # As in transformers, `attn_logit_softcapping` has no effect.
    fields.defaults(262208, 2304, 9216, 26, 8, 4, 131072, **SLIDING)
    | {"final_logit_softcapping": None, "sliding_window_pattern": 6}
    | {"rope_local_base_freq": 10_000.0, "rope_theta": 1_000_000.0},
    (LayerTypeRopes(), fields.layer_types_group(fields.every)),
    fields=SCALAR,
    only=CAUSAL,
)

SANDWICH = {
    "input_layernorm": "attn_in",
    "post_attention_layernorm": "attn_out",
    "pre_feedforward_layernorm": "mlp_in",
    "post_feedforward_layernorm": "mlp_out",
}
GEMMA3_NAMES = {**OUTER, **prefix_names("model.layers.{n}.", {**ATTENTION, **QK_NORMS, **MLP, **SANDWICH})}

FAMILIES = (
    Family(("gemma",), "GemmaForCausalLM", GEMMA, (LLAMA_NAMES,)),
    Family(("gemma2",), "Gemma2ForCausalLM", GEMMA2, (GEMMA3_NAMES,)),
    Family(("gemma3_text",), "Gemma3ForCausalLM", GEMMA3, (GEMMA3_NAMES,), wrappers=("gemma3",)),
)
