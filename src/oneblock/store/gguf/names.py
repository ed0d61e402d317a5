"""llama.cpp's architectures as data: which class of ours each is, its settings, and where it keeps each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.spec import Moe, Spec
from oneblock.store.name_tables import DiskTensor, Family, Shape, TensorSlice, map_tensors

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
class Arch:
    """What the files of one architecture say, and how they differ from Hugging Face's."""

    model_type: str  # it is read as this class
    keys: Mapping[str, str]  # setting, without the architecture's name -> key of config.json
    rotates: bool = True
    pairs: bool = False  # a head's rotated rows lie as neighbours, not as halves
    flags: Mapping[str, str] = field(default_factory=dict)  # key of config.json -> a tensor that is there if it is true
    every: int = 0  # each layer of this number sees all, the others a window
    wide: int = 0  # with this many layers, scores are scaled by dim / heads instead of by the head's width
    fixed: Mapping[str, object] = field(default_factory=dict)  # of config.json: what llama.cpp takes for granted


ARCHS = {
    "llama": Arch("llama", SIZES | HEAD | WINDOW | EXPERTS | {COUNT: "num_local_experts"}, pairs=True, flags=BIASES),
    "qwen2": Arch("qwen2", SIZES | HEAD),
    "qwen3": Arch("qwen3", SIZES | HEAD),
    "qwen3moe": Arch(
        "qwen3_moe",
        SIZES | HEAD | EXPERTS | {COUNT: "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        fixed={"norm_topk_prob": True},
    ),
    "gemma": Arch("gemma", SIZES | HEAD),
    "gemma2": Arch("gemma2", SIZES | HEAD | WINDOW | CAPS, every=2, wide=46),
    "gemma3": Arch("gemma3_text", SIZES | HEAD | WINDOW | CAPS, every=6, wide=62),
    "phi3": Arch("phi3", SIZES | WINDOW),
    "gpt2": Arch("gpt2", GPT2, rotates=False),
}
WRITTEN_AS = dict.fromkeys(("llama", "mistral", "mixtral"), "llama")
WRITTEN_AS |= {arch.model_type: name for name, arch in ARCHS.items()}
# The rotation's divisors, which are settings in all but their place.
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Place:
    """One tensor of a file: its shape, which of ours it holds row after row, and how its numbers differ.

    The rows of a stack of experts are those of all, one expert after another.
    """

    shape: Shape
    parts: tuple[TensorSlice, ...]
    heads: int = 0  # the rows of each of so many heads lie as neighbours; 0: as ours
    offset: float = 0.0  # its numbers are ours plus this

    def order(self) -> Tensor | None:
        """Our row for each row of the file: of a head of 6, rows 0 3 1 4 2 5. None: the same."""
        rows = torch.arange(self.shape[0])
        return rows.view(self.heads, 2, -1).transpose(1, 2).reshape(-1) if self.heads else None


def places(name: str, family: Family, spec: Spec, shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """Every tensor of a model's file. OneblockError where the architecture has no name for one of ours."""
    number = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
    names = get_tensor_name_map(number, spec.n_layers)
    known = map_tensors(family.tables[0], spec, shapes)
    if known is None:
        raise OneblockError("the model has parameters that are not the spec's: merge or remove what was added")
    found: dict[str, Place] = {}
    for disk, slot in known.items():
        disk = disk.replace(f".experts.{slot.expert}.", ".experts.")  # a stack is one tensor
        own = names.get_name(disk, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise OneblockError(f"architecture {name!r} of GGUF has no place for {disk}: this model cannot be one")
        found[own] = _place(own, slot, spec, ARCHS[name])
    return found


def _place(name: str, slot: DiskTensor, spec: Spec, arch: Arch) -> Place:
    assert slot.groups == 1, "none of these architectures weaves its rows"
    if slot.expert is not None:
        count = next(layer.mlp.n_experts for layer in spec.layers if isinstance(layer.mlp, Moe))
        [part] = slot.parts
        return Place((count, *slot.shape), (TensorSlice(part.name, 0, count * part.size),))
    attn, heads = spec.layers[0].attn, 0
    if arch.pairs and ".attn_q." in name:
        heads = attn.n_heads
    if arch.pairs and ".attn_k." in name:
        heads = attn.n_kv_heads
    offset = spec.norm.weight_offset if name.endswith("norm.weight") else 0.0
    return Place(slot.shape[::-1] if slot.transposed else slot.shape, slot.parts, heads, offset)
