"""Weight initialisation for training from scratch."""

from __future__ import annotations

import torch
from torch import nn

from oneblock.model.decoder import Decoder
from oneblock.model.mlp import Experts
from oneblock.model.norm import Norm

STD, WIDTH = 0.02, 768  # GPT-2's standard deviation at its width; narrower models need a larger one


@torch.no_grad()
def init_weights(model: Decoder, seed: int, zero_init_residual: bool = False, embed_std: float | None = None) -> None:
    """GPT-2's initialisation: normal weights, residual projections smaller by sqrt(2 * layers), norm weights one.

    The standard deviation scales with 1 / sqrt(width): 0.05 at width 128, where short runs reach a lower loss
    (docs/train.md). Weights are drawn on the CPU in fp32, so a seed gives the same ones on every device.
    `zero_init_residual`: `wo` and `down` are zero, so blocks start as the identity (arXiv:2203.03466, app. D.2).
    `embed_std`: standard deviation of the embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    std = STD * (WIDTH / model.spec.dim) ** 0.5
    residual_std = std * (2 * model.spec.n_layers) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            module.weight.fill_(1.0 - module.spec.weight_offset)
        for key, p in module.named_parameters(recurse=False):
            if isinstance(module, Norm) and key == "weight":
                continue
            if isinstance(module, (nn.Linear, nn.Embedding, Experts)) and p.dim() > 1 and not key.endswith("bias"):
                is_residual = name.endswith((".wo", ".down")) or (isinstance(module, Experts) and key == "down")
                p_std = residual_std * (not zero_init_residual) if is_residual else std
                if embed_std is not None and isinstance(module, nn.Embedding):
                    p_std = embed_std
                p.copy_(torch.empty(p.shape).normal_(0.0, p_std, generator=generator))
            else:
                p.zero_()
