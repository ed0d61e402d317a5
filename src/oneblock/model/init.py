"""Weights to begin training with."""

from __future__ import annotations

import torch
from torch import nn

from oneblock.model.decoder import Decoder
from oneblock.model.mlp import Experts
from oneblock.model.norm import Norm

STD, WIDTH = 0.02, 768  # GPT-2's, at its width; in narrower models it takes more to be heard


@torch.no_grad()
def init_weights(model: Decoder, seed: int, zero_out: bool = False, embed_std: float | None = None) -> None:
    """GPT-2's start: normal weights, those that write to the stream smaller by sqrt(2 x layers), gains at one.

    The spread goes with 1 / sqrt(width): 0.05 at 128, where short runs end lower by it (docs/train.md).
    The same seed gives the same weights on every device: they are drawn on the CPU in fp32. `zero_out`: those that
    write to the stream begin at zero (arXiv:2203.03466, appendix D.2); `embed_std`: spread of the embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    std = STD * (WIDTH / model.spec.dim) ** 0.5
    into_stream = std * (2 * model.spec.n_layers) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            module.weight.fill_(1.0 - module.spec.weight_offset)
        for key, p in module.named_parameters(recurse=False):
            if isinstance(module, Norm) and key == "weight":
                continue
            if isinstance(module, (nn.Linear, nn.Embedding, Experts)) and p.dim() > 1 and not key.endswith("bias"):
                last = name.endswith((".wo", ".down")) or (isinstance(module, Experts) and key == "down")
                spread = into_stream * (not zero_out) if last else std
                if embed_std is not None and isinstance(module, nn.Embedding):
                    spread = embed_std
                p.copy_(torch.empty(p.shape).normal_(0.0, spread, generator=generator))
            else:
                p.zero_()
