"""Normalisation over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock import spec as s


class Norm(nn.Module):
    """LayerNorm or RMSNorm of (..., dim), computed in fp32 whatever the dtype of x."""

    def __init__(self, spec: s.Norm, dim: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - spec.weight_offset))
        self.bias = nn.Parameter(torch.zeros(dim)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = self.weight, self.spec.eps
        if self.spec.weight_offset:
            weight = weight.float() + self.spec.weight_offset
        if self.spec.kind == "layer":
            return F.layer_norm(x, weight.shape, weight.type_as(x), _cast(self.bias, x), eps)
        if not self.spec.scale_in_fp32 and x.dtype != torch.float32:  # in fp32 both orders are one
            h = F.rms_norm(x, weight.shape, None, eps) * weight.type_as(x)
        else:
            h = F.rms_norm(x.float(), weight.shape, weight.float(), eps).type_as(x)
        return h if self.bias is None else h + self.bias.type_as(x)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight over each head's dimensions: Llama 4's QK norm."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


def _cast(x: Tensor | None, like: Tensor) -> Tensor | None:
    return x if x is None else x.type_as(like)
