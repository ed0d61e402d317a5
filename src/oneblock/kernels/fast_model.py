"""Fast forms of a model's parts that depend on device and dtype: attention backend, grouped matmul, autocast casts."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock.kernels.attention.backend import FastAttention
from oneblock.kernels.substitution import as_subclass
from oneblock.model import Decoder
from oneblock.model.context import reference_attention
from oneblock.model.mlp import Experts, Moe


class GroupedExperts(Experts):
    """Experts whose matmuls are one grouped matmul, where torch has it for their dtype and sizes."""

    def grouped_mm(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        if not can_group(x, self.up, self.down):
            return super().grouped_mm(x, weight, ends)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def can_group(x: Tensor, *weights: Tensor) -> bool:
    """Whether `F.grouped_mm` takes x: rows are multiples of 16 bytes, and bf16 on GPUs and in compiled graphs."""
    aligned = all(size * x.element_size() % 16 == 0 for w in weights for size in w.shape[1:])
    any_dtype = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return hasattr(F, "grouped_mm") and aligned and (any_dtype or x.dtype == torch.bfloat16)


def use_fast_kernels(model: Decoder, cpu_operators: bool = False) -> None:
    """Set the fast attention backend and replace experts by grouped ones, in place: parameters and names stay.

    `cpu_operators`: attention with our C++ operators on CPUs, for inference.
    """
    model.attention_backend = FastAttention(use_cpu_operators=cpu_operators)
    for module in model.modules():
        if isinstance(module, Moe) and type(module.experts) is Experts:
            module.experts = cast(Experts, as_subclass(module.experts, GroupedExperts))


def prepare_for_training(model: Decoder) -> None:
    """Use fast kernels, and cast each sublayer's input to the autocast dtype once instead of in each linear layer.

    In place; before activation checkpointing, sharding and compilation. Does nothing the second time.
    """
    if model.attention_backend is reference_attention:
        use_fast_kernels(model)
    for block in model.blocks:
        for sublayer in cast(list[nn.Module], [block.attn, block.mlp]):
            if cast_for_autocast not in sublayer._forward_pre_hooks.values():
                sublayer.register_forward_pre_hook(cast_for_autocast)


def cast_for_autocast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook that casts a sublayer's input where autocast is enabled."""
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return None
    return args[0].to(torch.get_autocast_dtype(device)), *args[1:]
