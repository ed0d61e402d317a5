"""A model too large for one device: each rank has some heads and some of the MLP's width (arXiv:1909.08053).

Started by torchrun. Ranks hold plain tensors, so that products and caches are what they are on one; what they write to
the stream is added up. All ranks choose the same tokens, from the same seed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.infer.linears import Coded
from oneblock.model import Decoder
from oneblock.model.attention import Attention
from oneblock.model.mlp import Mlp
from oneblock.ranks import Ranks


class Summed(nn.Module):
    """A product of which each rank has some columns."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        bias, linear.bias = linear.bias, None  # type: ignore[assignment]
        self.linear, self.bias = linear, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        dist.all_reduce(y)
        return y if self.bias is None else y + self.bias


def check(model: Decoder, ranks: Ranks) -> None:
    """OneblockError where the model does not divide, with the numbers that disagree."""
    if any(isinstance(module, Coded) for module in model.modules()):
        raise OneblockError("weights in few bits are not split over ranks yet: run it on one, or take the plain model")
    for layer in model.spec.pattern:
        a, width = layer.attn, getattr(layer.mlp, "hidden", None)
        if width is None:
            raise OneblockError("experts are not split over ranks yet: run it on one")
        if a.cross or a.qk_norm == "full" or a.sinks:
            raise OneblockError(
                "sinks, norms over all heads and cross-attention are not split over ranks: run it on one"
            )
        for what, n in (("heads", a.n_heads), ("KV heads", a.n_kv_heads), ("hidden numbers", width)):
            if n % ranks.size:
                raise OneblockError(f"{n} {what} do not divide by {ranks.size} ranks")


def split(model: Decoder, ranks: Ranks) -> None:
    """In place: this rank's part of every block. Before `streamline`."""
    check(model, ranks)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            for name in ("wq", "wk", "wv"):
                setattr(module, name, part(getattr(module, name), ranks, 0))
            module.wo = Summed(part(module.wo, ranks, 1))  # type: ignore[assignment]
        if isinstance(module, Mlp):
            module.up = part(module.up, ranks, 0)
            module.gate = part(module.gate, ranks, 0) if module.gate is not None else None
            module.down = Summed(part(module.down, ranks, 1))  # type: ignore[assignment]


def part(linear: nn.Linear, ranks: Ranks, dim: int) -> nn.Linear:
    """This rank's rows (0) or columns (1), copied, so that the rest can go."""
    weight = linear.weight.detach().chunk(ranks.size, dim)[ranks.rank].clone()
    with torch.device("meta"):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    new.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        bias = linear.bias.detach()
        bias = bias.chunk(ranks.size)[ranks.rank].clone() if dim == 0 else bias
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new
