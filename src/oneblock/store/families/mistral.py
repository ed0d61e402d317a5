"""Mistral and Mixtral."""

from __future__ import annotations

from oneblock.spec import FAMILIES as BUILD
from oneblock.spec import Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import Fields, Raw
from oneblock.store.families.llama import ATTENTION, LLAMA_NAMES, OUTER, PRE_NORMS, head_dim
from oneblock.store.families.rope import read_rope, write_rope
from oneblock.store.name_tables import Family, expert_names, prefix_names, rule

MISTRAL = fields.SIZES | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
MISTRAL |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6}
MISTRAL |= {"max_position_embeddings": 131072, "sliding_window": 4096}
MIXTRAL = MISTRAL | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8}


def read_mistral(raw: Raw) -> Spec:
    f = Fields(raw, MISTRAL)
    common = fields.sizes(f)
    rope, window = read_rope(f, head_dim(common)), f.whole_or_none("sliding_window")
    return BUILD["mistral"](**common, hidden_dim=f.whole("intermediate_size"), rope=rope, window=window)


def write_mistral(spec: Spec) -> Raw:
    attn = spec.layers[0].attn
    return {
        **fields.sizes_written(spec),
        "intermediate_size": fields.some_mlp(spec).hidden_dim,
        "rope_parameters": write_rope(attn.rope, attn.head_dim),
        "sliding_window": attn.window,
    }


def read_mixtral(raw: Raw) -> Spec:
    f = Fields(raw, MIXTRAL)
    common = fields.sizes(f)
    return BUILD["mixtral"](
        **common,
        hidden_dim=f.whole("intermediate_size"),
        n_experts=f.whole("num_local_experts", "num_experts"),
        top_k=f.whole("num_experts_per_tok"),
        rope=read_rope(f, head_dim(common), theta=1_000_000.0),
        window=f.whole_or_none("sliding_window"),
    )


def write_mixtral(spec: Spec) -> Raw:
    moe = fields.some_moe(spec)
    return {**write_mistral(spec), "num_local_experts": moe.n_experts, "num_experts_per_tok": moe.top_k}


FUSED_EXPERTS = {
    "mlp.experts.gate_up_proj": rule("mlp.experts.gate", "mlp.experts.up"),
    "mlp.experts.down_proj": "mlp.experts.down",
}
MIXTRAL_NAMES = {
    **OUTER,
    **prefix_names(
        "model.layers.{n}.",
        {
            **ATTENTION,
            **PRE_NORMS,
            "block_sparse_moe.gate": "mlp.router",
            **expert_names("block_sparse_moe.experts", ("w1", "w3", "w2")),
        },
    ),
}
MIXTRAL_FUSED = {
    **OUTER,
    **prefix_names("model.layers.{n}.", {**ATTENTION, **PRE_NORMS, "mlp.gate": "mlp.router", **FUSED_EXPERTS}),
}

FAMILIES = (
    Family(("mistral",), "MistralForCausalLM", read_mistral, write_mistral, (LLAMA_NAMES,)),
    Family(("mixtral",), "MixtralForCausalLM", read_mixtral, write_mixtral, (MIXTRAL_NAMES, MIXTRAL_FUSED)),
)
