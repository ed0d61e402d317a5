"""The MLP sublayer, dense or a mixture of experts.

Shapes: N tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock import spec as s

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activate(spec: s.Mlp, up: Tensor, gate: Tensor | None) -> Tensor:
    """The MLP between its linear layers: act(up), or act(gate) * up."""
    if gate is None:
        return ACT[spec.act](up)
    if spec.clamp is not None:
        gate, up = gate.clamp(max=spec.clamp), up.clamp(-spec.clamp, spec.clamp)
    return ACT[spec.act](gate) * (up + spec.up_offset if spec.up_offset else up)


class Mlp(nn.Module):
    def __init__(self, spec: s.Mlp, dim: int):
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(dim, spec.hidden_dim, bias=spec.bias) if spec.gated else None
        self.up = nn.Linear(dim, spec.hidden_dim, bias=spec.bias)
        self.down = nn.Linear(spec.hidden_dim, dim, bias=spec.bias)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        h = self.hidden_activations(x)
        return self.down(F.dropout(h, dropout) if dropout else h)

    def hidden_activations(self, x: Tensor) -> Tensor:
        """The input of `down`: (.., dim) -> (.., hidden_dim)."""
        return activate(self.spec, self.up(x), None if self.gate is None else self.gate(x))


class Experts(nn.Module):
    """E MLPs of one shape, weights stacked, each in the (out, in) order of nn.Linear."""

    def __init__(self, spec: s.Mlp, n_experts: int, dim: int):
        super().__init__()
        self.spec, self.n_experts = spec, n_experts

        def weight(n_out: int, n_in: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(n_experts, n_out, n_in).normal_(std=n_in**-0.5))

        def bias(n_out: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(n_experts, n_out)) if spec.bias else None

        self.gate = weight(spec.hidden_dim, dim) if spec.gated else None
        self.up, self.down = weight(spec.hidden_dim, dim), weight(dim, spec.hidden_dim)
        self.gate_bias = bias(spec.hidden_dim) if spec.gated else None
        self.up_bias, self.down_bias = bias(spec.hidden_dim), bias(dim)

    def forward(self, x: Tensor, expert: Tensor, dropout: float = 0.0) -> Tensor:
        """Pass each row of x (N, dim), sorted by expert (N,), through its expert: (N, dim)."""
        ids = torch.arange(self.n_experts, device=x.device, dtype=expert.dtype)
        ends = torch.searchsorted(expert, ids, right=True).to(torch.int32)

        def linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = self.grouped_mm(h, weight.type_as(h), ends)
            return y if bias is None else y + bias[expert].type_as(y)

        gate = None if self.gate is None else linear(x, self.gate, self.gate_bias)
        h = activate(self.spec, linear(x, self.up, self.up_bias), gate)
        return linear(F.dropout(h, dropout) if dropout else h, self.down, self.down_bias)

    def grouped_mm(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """Multiply each expert's rows, ending at `ends` (E,), by its weight: (N, in), (E, out, in) -> (N, out)."""
        return grouped_mm_reference(x, weight, ends)


@torch.library.custom_op("oneblock::grouped_mm", mutates_args=())
def grouped_mm_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (N, in) up to ends[0] times weight[0].T, the next up to ends[1] times weight[1].T, ..: (N, out).

    A custom operator, since a compiled graph cannot hold sizes that depend on data.
    """
    return torch.cat([F.linear(x[i:j], w) for i, j, w in split_groups(ends, weight)])


@grouped_mm_reference.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("oneblock::grouped_outer_product", mutates_args=())
def grouped_outer_product(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """grad.T @ x of each group of rows: the gradient of its weight, (E, out, in)."""
    return torch.stack([grad[i:j].T @ x[i:j] for i, j, _ in split_groups(ends, ends)])


@grouped_outer_product.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    return grouped_mm_reference(grad, weight.transpose(1, 2), ends), grouped_outer_product(grad, x, ends), None


grouped_mm_reference.register_autograd(
    _grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def split_groups(ends: Tensor, per_group: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First row, end row and entry of `per_group` of each group."""
    bounds = ends.tolist()
    return zip([0, *bounds], bounds, per_group, strict=False)


class Moe(nn.Module):
    """Mixture of experts: the weighted sum of each token's top-k experts (arXiv:1701.06538)."""

    def __init__(self, spec: s.Moe, dim: int):
        super().__init__()
        self.spec = spec
        self.router = nn.Linear(dim, spec.n_experts, bias=spec.router_bias)
        self.experts = Experts(spec.expert, spec.n_experts, dim)
        self.shared = Mlp(spec.shared, dim) if spec.shared else None
        self.shared_gate = nn.Linear(dim, 1, bias=False) if spec.shared_gate else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Router weights (fp32) and indices of each token's top-k experts: (N, k) each."""
        logits = self.router(x).float()
        scores = logits.softmax(-1) if self.spec.score_func == "softmax" else logits.sigmoid()
        weight, index = scores.topk(self.spec.top_k, -1)
        return (weight / weight.sum(-1, keepdim=True) if self.spec.renormalize else weight), index

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        shape, x = x.shape, x.flatten(0, -2)  # (N, dim)
        out = self.forward_experts(x, dropout)
        if self.shared is not None:
            y = self.shared(x, dropout)
            out = out + (y if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * y)
        return out.view(shape)

    def forward_experts(self, x: Tensor, dropout: float) -> Tensor:
        """The routed experts' weighted sum, without the shared expert: (N, dim) -> (N, dim)."""
        weight, index = self.route(x)
        expert, order = index.flatten().sort(stable=True)
        weight = weight.flatten()[order, None].type_as(x)
        rows = x[order // self.spec.top_k]
        y = (
            self.experts(rows * weight, expert, dropout)
            if self.spec.scale_expert_input
            else weight * self.experts(rows, expert, dropout)
        )
        unsort = order.argsort()  # a fixed order of summation makes results reproducible
        return y[unsort].view(-1, self.spec.top_k, y.shape[-1]).sum(1)
