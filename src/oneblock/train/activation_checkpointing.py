"""Activation checkpointing (arXiv:1604.06174): keep less for the backward pass and compute it again there."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from oneblock.model import Decoder

# What costs most to compute again and little to keep; norms, activations, rotations are done twice
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute(model: Decoder, mode: Literal["none", "selective", "full"]) -> None:
    """Make every block keep its input alone (full), or that and its products (selective)."""
    if mode == "none":
        return
    again = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, policy))
    for block in model.blocks:
        block.forward = partial(again, block.forward)


def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
