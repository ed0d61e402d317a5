"""Qwen2 and 2.5, Qwen3, and their mixtures of experts."""

from __future__ import annotations

from oneblock.spec import Spec
from oneblock.store.families import fields
from oneblock.store.families.fields import BIAS, FLAG, INT, SWITCHED_WINDOW, ConfigTable, Field, Group, Keywords, Values
from oneblock.store.families.llama import LAYER, LLAMA_NAMES, OUTER, QK_NORMS, moe_layers
from oneblock.store.families.mistral import FUSED_EXPERTS
from oneblock.store.families.rope import RopeKeys
from oneblock.store.name_tables import Family, expert_names, prefix_names


def _from_max_window_layers(values: Values, keywords: Keywords) -> list[bool]:
    return [i >= values.get("max_window_layers") for i in range(keywords["n_layers"])]


def _even_below_max_window_layers(values: Values, keywords: Keywords) -> list[bool]:
    return [i % 2 == 0 and i < values.get("max_window_layers") for i in range(keywords["n_layers"])]


def _read_sparse(values: Values, keywords: Keywords) -> Keywords:
    step, dense = values.read("decoder_sparse_step", INT), values.ints("mlp_only_layers") or []
    return {"sparse": tuple(i not in dense and (i + 1) % step == 0 for i in range(keywords["n_layers"]))}


def _shared_hidden_dim(spec: Spec) -> int | None:
    return fields.of_moe(lambda moe: moe.shared and moe.shared.hidden_dim)(spec)


SPARSE = Group(_read_sparse, lambda spec: {"mlp_only_layers": moe_layers(spec, sparse=False)})
WINDOW_OF_GROUP = {"sliding_window": None}  # read by SWITCHED_WINDOW

WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
LAYERS = {"decoder_sparse_step": 1, "norm_topk_prob": False, "mlp_only_layers": None}

QWEN2 = ConfigTable(
    "qwen2",
    fields.defaults(151936, 4096, 22016, 32, 32, 32, 32768, rms_norm_eps=1e-6, layer_types=None) | WINDOW,
    (RopeKeys(), SWITCHED_WINDOW, fields.layer_types_group(_from_max_window_layers)),
    fields=WINDOW_OF_GROUP,
)
QWEN3 = ConfigTable(
    "qwen3", QWEN2.defaults | {"head_dim": 128, "attention_bias": False}, QWEN2.groups, fields=WINDOW_OF_GROUP
)
QWEN2_MOE = ConfigTable(
    "qwen2_moe",
    fields.defaults(151936, 2048, 5632, 24, 16, 16, 32768, rms_norm_eps=1e-6, layer_types=None, qkv_bias=True)
    | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    | {"num_experts_per_tok": 4, "num_experts": 60, **WINDOW, **LAYERS},
    (RopeKeys(), SWITCHED_WINDOW, fields.layer_types_group(_even_below_max_window_layers), SPARSE),
    fields=WINDOW_OF_GROUP
    | {
        "shared_expert_intermediate_size": Field("shared_hidden_dim", INT, _shared_hidden_dim),
        "qkv_bias": Field("qkv_bias", FLAG, BIAS.get),
    },
)
QWEN3_MOE = ConfigTable(
    "qwen3_moe",
    fields.defaults(151936, 2048, 6144, 24, 32, 4, 32768, rms_norm_eps=1e-6, attention_bias=False)
    | {"moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128, **WINDOW, **LAYERS},
    (RopeKeys(), SWITCHED_WINDOW, SPARSE),
    fields=WINDOW_OF_GROUP,
)

QK_NORMED = {**OUTER, **prefix_names("model.layers.{n}.", {**LAYER, **QK_NORMS})}
MOE_LAYER = {
    **LAYER,
    **QK_NORMS,
    **{f"mlp.shared_expert.{x}_proj": f"mlp.shared.{x}" for x in ("gate", "up", "down")},
    "mlp.gate": "mlp.router",
    "mlp.shared_expert_gate": "mlp.shared_gate",
}
MOE_NAMES, MOE_FUSED = (
    {**OUTER, **prefix_names("model.layers.{n}.", {**MOE_LAYER, **each})}
    for each in (expert_names("mlp.experts"), FUSED_EXPERTS)
)

FAMILIES = (
    Family(("qwen2",), "Qwen2ForCausalLM", QWEN2, (LLAMA_NAMES,)),
    Family(("qwen2_moe",), "Qwen2MoeForCausalLM", QWEN2_MOE, (MOE_NAMES, MOE_FUSED)),
    Family(("qwen3",), "Qwen3ForCausalLM", QWEN3, (QK_NORMED,)),
    Family(("qwen3_moe",), "Qwen3MoeForCausalLM", QWEN3_MOE, (MOE_NAMES, MOE_FUSED)),
)
