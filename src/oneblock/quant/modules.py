"""Quantized forms of the modules that are no linear layers: a tied embedding, and mixture-of-experts weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock.model.mlp import Experts, activate
from oneblock.quant.linear import Float8Linear, QuantizedLinear

QuantizedLayer = QuantizedLinear | Float8Linear


class QuantizedEmbedding(nn.Module):
    """An input embedding that dequantizes rows of the LM head it is tied to."""

    def __init__(self, head: QuantizedLayer, dtype: torch.dtype):
        super().__init__()
        self.head, self.dtype = [head], dtype  # in a list: not a submodule, so its tensors are named once

    def forward(self, ids: Tensor) -> Tensor:
        return self.head[0].dequantize(ids.flatten()).view(*ids.shape, -1).to(self.dtype)


class QuantizedExperts(nn.Module):
    """`Experts` with one quantized linear layer per expert and matrix."""

    def __init__(self, experts: Experts, quantize_matrix: Callable[[str, Tensor, Tensor | None], QuantizedLayer]):
        super().__init__()
        self.spec, self.n_experts = experts.spec, experts.n_experts
        self.handle = register(self)

        def layers(name: str) -> nn.ModuleList:
            weights, biases = getattr(experts, name), getattr(experts, f"{name}_bias")
            pairs = enumerate(zip(weights, weights if biases is None else biases, strict=True))
            return nn.ModuleList(
                quantize_matrix(f"{name}.{e}", w, None if biases is None else b) for e, (w, b) in pairs
            )

        self.gate = None if experts.gate is None else layers("gate")
        self.up, self.down = layers("up"), layers("down")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = register(self)  # a copy is another module

    def forward(self, x: Tensor, expert: Tensor, dropout: float = 0.0) -> Tensor:
        """Apply to each row of x (N, dim), sorted by expert, its expert (N,): (N, dim)."""
        if torch.compiler.is_compiling():
            return quantized_experts(x, expert, self.handle)
        return self.forward_experts(x, expert, dropout)

    def forward_experts(self, x: Tensor, expert: Tensor, dropout: float = 0.0) -> Tensor:
        counts = torch.bincount(expert, minlength=self.n_experts).tolist()
        outputs = []
        for e, rows in enumerate(x.split(counts)):
            if len(rows):
                gate = None if self.gate is None else self.gate[e](rows)
                h = activate(self.spec, self.up[e](rows), gate)
                outputs.append(self.down[e](F.dropout(h, dropout) if dropout else h))
        return torch.cat(outputs)


# A graph cannot contain the row counts of the experts, which depend on data, and an operator cannot take a module, so
# graphs contain an operator that finds its module by number.
MODULES: WeakValueDictionary[int, QuantizedExperts] = WeakValueDictionary()
HANDLES = count()


def register(module: QuantizedExperts) -> int:
    handle = next(HANDLES)
    MODULES[handle] = module
    return handle


@torch.library.custom_op("oneblock::quantized_experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def quantized_experts(x: Tensor, expert: Tensor, handle: int) -> Tensor:
    return MODULES[handle].forward_experts(x, expert)


@quantized_experts.register_fake
def _(x: Tensor, expert: Tensor, handle: int) -> Tensor:
    return torch.empty_like(x)
