"""Mistral and Mixtral."""

from __future__ import annotations

from oneblock.store.families import fields
from oneblock.store.families.fields import ConfigTable
from oneblock.store.families.llama import ATTENTION, LLAMA_NAMES, OUTER, PRE_NORMS
from oneblock.store.families.rope import RopeKeys
from oneblock.store.name_tables import Family, expert_names, prefix_names, rule

MISTRAL = ConfigTable(
    "mistral",
    fields.defaults(32000, 4096, 14336, 32, 32, 8, 131072, rms_norm_eps=1e-6, sliding_window=4096),
    (RopeKeys(),),
)
MIXTRAL = ConfigTable(
    "mixtral",
    fields.defaults(32000, 4096, 14336, 32, 32, 8, 131072, rms_norm_eps=1e-5, sliding_window=None)
    | {"num_experts_per_tok": 2, "num_local_experts": 8},
    (RopeKeys(theta=1_000_000.0),),
    fields={"intermediate_size": fields.EXPERT_DIM},
)

FUSED_EXPERTS = {
    "mlp.experts.gate_up_proj": rule("mlp.experts.gate", "mlp.experts.up"),
    "mlp.experts.down_proj": "mlp.experts.down",
}
MIXTRAL_LAYER = {
    **ATTENTION,
    **PRE_NORMS,
    "block_sparse_moe.gate": "mlp.router",
    **expert_names("block_sparse_moe.experts", ("w1", "w3", "w2")),
}
FUSED_LAYER = {**ATTENTION, **PRE_NORMS, "mlp.gate": "mlp.router", **FUSED_EXPERTS}
MIXTRAL_NAMES, MIXTRAL_FUSED = (
    {**OUTER, **prefix_names("model.layers.{n}.", layer)} for layer in (MIXTRAL_LAYER, FUSED_LAYER)
)

FAMILIES = (
    Family(("mistral",), "MistralForCausalLM", MISTRAL, (LLAMA_NAMES,)),
    Family(("mixtral",), "MixtralForCausalLM", MIXTRAL, (MIXTRAL_NAMES, MIXTRAL_FUSED)),
)
