"""llama.cpp's architectures as data: the Hugging Face class of each, its metadata keys, its tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from oneblock.errors import OneblockError
from oneblock.spec import Moe, Spec
from oneblock.store.name_tables import DiskTensor, DiskTensors, Family, Shape, TensorSlice, map_tensors

SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
HEAD = {"attention.key_length": "head_dim"}
WINDOW = {"attention.sliding_window": "sliding_window"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
COUNT = "expert_count"
EXPERTS = {"expert_used_count": "num_experts_per_tok"}
GPT2 = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}


@dataclass(frozen=True)
class Architecture:
    """The metadata of one architecture's files, and how the files differ from Hugging Face's."""

    model_type: str  # the class it is read as
    keys: Mapping[str, str]  # metadata key without the architecture's name -> key of config.json
    has_rope: bool = True
    interleaved_pairs: bool = False  # RoPE rotates interleaved pairs of rows, not halves
    tensor_flags: Mapping[str, str] = field(default_factory=dict)  # key of config.json -> the tensor that sets it
    full_attention_every: int = 0  # this many layers apart, the others have a sliding window
    dim_scaled_depth: int = 0  # a model of this many layers scales scores by dim / n_heads instead of head_dim
    constants: Mapping[str, object] = field(default_factory=dict)  # values of config.json that llama.cpp hard-codes


ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        SIZES | HEAD | WINDOW | EXPERTS | {COUNT: "num_local_experts"},
        interleaved_pairs=True,
        tensor_flags=BIASES,
    ),
    "qwen2": Architecture("qwen2", SIZES | HEAD),
    "qwen3": Architecture("qwen3", SIZES | HEAD),
    "qwen3moe": Architecture(
        "qwen3_moe",
        SIZES | HEAD | EXPERTS | {COUNT: "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        constants={"norm_topk_prob": True},
    ),
    "gemma": Architecture("gemma", SIZES | HEAD),
    "gemma2": Architecture("gemma2", SIZES | HEAD | WINDOW | CAPS, full_attention_every=2, dim_scaled_depth=46),
    "gemma3": Architecture("gemma3_text", SIZES | HEAD | WINDOW | CAPS, full_attention_every=6, dim_scaled_depth=62),
    "phi3": Architecture("phi3", SIZES | WINDOW),
    "gpt2": Architecture("gpt2", GPT2, has_rope=False),
}
WRITTEN_AS = dict.fromkeys(("llama", "mistral", "mixtral"), "llama")
WRITTEN_AS |= {arch.model_type: name for name, arch in ARCHITECTURES.items()}
# Divisors of the RoPE frequencies: configuration that GGUF stores as tensors.
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def map_gguf_tensors(arch: str, family: Family, spec: Spec, shapes: Mapping[str, Shape]) -> DiskTensors:
    """Every tensor of a model's file. OneblockError if the architecture has no name for a parameter."""
    number = next(key for key, value in MODEL_ARCH_NAMES.items() if value == arch)
    names = get_tensor_name_map(number, spec.n_layers)
    disk_tensors = map_tensors(family.tables[0], spec, shapes)
    if disk_tensors is None:
        raise OneblockError("the model has parameters that are not the spec's; merge or remove what was added")
    mapped: DiskTensors = {}
    for hf_name, disk in disk_tensors.items():
        hf_name = hf_name.replace(f".experts.{disk.expert}.", ".experts.")  # a stack is one tensor
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise OneblockError(f"architecture {arch!r} of GGUF has no tensor for {hf_name}; this model cannot be one")
        mapped[name] = _gguf_tensor(name, disk, spec, ARCHITECTURES[arch])
    return mapped


def _gguf_tensor(name: str, disk: DiskTensor, spec: Spec, arch: Architecture) -> DiskTensor:
    assert disk.groups == 1, "none of these architectures interleaves fused rows"
    if disk.expert is not None:
        n_experts = next(layer.mlp.n_experts for layer in spec.layers if isinstance(layer.mlp, Moe))
        return DiskTensor((n_experts, *disk.shape), (TensorSlice(disk.parts[0].name, 0, n_experts),))
    attn, heads = spec.layers[0].attn, 0
    if arch.interleaved_pairs and ".attn_q." in name:
        heads = attn.n_heads
    if arch.interleaved_pairs and ".attn_k." in name:
        heads = attn.n_kv_heads
    offset = spec.norm.weight_offset if name.endswith("norm.weight") else 0.0
    shape = disk.shape[::-1] if disk.transposed else disk.shape
    return DiskTensor(shape, disk.parts, interleaved_heads=heads, weight_offset=offset)
