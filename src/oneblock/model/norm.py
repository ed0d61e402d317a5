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
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - spec.offset))
        self.bias = nn.Parameter(torch.zeros(dim)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "layer":
            gain = self.weight + self.spec.offset if self.spec.offset else self.weight
            return F.layer_norm(x, gain.shape, gain.type_as(x), _cast(self.bias, x), self.spec.eps)
        return self._rms(x)

    def _rms(self, x: Tensor) -> Tensor:
        offset, eps, shape = self.spec.offset, self.spec.eps, self.weight.shape
        if x.dtype == torch.float32:
            gain = self.weight + offset if offset else self.weight
            h = F.rms_norm(x, shape, gain.float(), eps)
        elif self.spec.gain == "before":
            h = (F.rms_norm(x.float(), shape, self.weight.float() + offset, eps)).type_as(x)
        else:
            h = F.rms_norm(x.float(), shape, None, eps).type_as(x) * (self.weight + offset).type_as(x)
        return h if self.bias is None else h + self.bias


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a gain over each head's dimensions: Llama 4's norm of queries and keys."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).type_as(x)


def _cast(x: Tensor | None, like: Tensor) -> Tensor | None:
    return x if x is None else x.type_as(like)
