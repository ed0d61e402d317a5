"""Load balancing of mixtures of experts in training: by an auxiliary loss, or by updates of the routers' biases.

Shapes: L layers with experts, N tokens, E experts. Forward hooks on the routers read their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.model.mlp import Moe
from oneblock.train.options import Objective

Sum = Callable[[Tensor], Tensor]  # over all ranks


class Routing:
    """Router logits of the latest forward pass, and tokens per expert of the step."""

    def __init__(self, model: Decoder, objective: Objective, total: Sum = lambda x: x):
        self.layers = [m for m in model.modules() if isinstance(m, Moe)]
        self.objective, self.total = objective, total
        self.logits: dict[int, Tensor] = {}  # by layer, (N, E); a recomputed layer writes the same again
        self.counts: Tensor | None = None  # (L, E), over the micro-batches of the step so far
        for i, layer in enumerate(self.layers):
            layer.router.register_forward_hook(self._logits_hook(i))
        if objective.load_balancing == "bias" and self.layers:
            self._freeze_biases()

    def _logits_hook(self, i: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, logits: Tensor) -> None:
            self.logits[i] = logits

        return hook

    def _freeze_biases(self) -> None:
        if any(layer.router.bias is None for layer in self.layers):
            raise OneblockError(
                "--load-balancing bias updates the routers' biases, which this model lacks: use --load-balancing loss"
            )
        for layer in self.layers:
            layer.router.bias.requires_grad_(False)

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted auxiliary losses of the latest forward pass, and metrics: `load` is (L, E)."""
        expert_counts, shares, z_losses = zip(*(self._layer(i) for i in range(len(self.layers))), strict=True)
        counts = self.total(torch.stack(expert_counts))  # (L, E)
        load = counts / counts.sum(-1, keepdim=True)
        balance = load.shape[-1] * (load * torch.stack(shares)).sum(-1).mean()  # 1 where the load is even
        z = torch.stack(z_losses).mean()
        self.counts = counts if self.counts is None else self.counts + counts
        o = self.objective
        aux_loss = o.router_z_loss * z + (o.load_balancing_weight * balance if o.load_balancing == "loss" else 0.0)
        return aux_loss, {"load_balancing_loss": balance.detach(), "load": load}

    def _layer(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens per expert of one layer (E,), mean router probability (E,), and the z-loss."""
        spec, logits = self.layers[i].spec, self.logits[i].float()
        scores = logits.softmax(-1) if spec.score_func == "softmax" else logits.sigmoid()
        index = scores.topk(spec.top_k, -1).indices
        counts = torch.zeros(spec.n_experts, device=logits.device)
        counts = counts.scatter_add(0, index.flatten(), torch.ones(index.numel(), device=logits.device))
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        return counts, shares, logits.logsumexp(-1).square().mean()

    @torch.no_grad()
    def update_expert_bias(self, is_finite: Tensor) -> None:
        """Raise the bias of experts with less than the mean load and lower the others', unless the step was skipped."""
        if self.objective.load_balancing == "bias" and self.counts is not None:
            for layer, counts in zip(self.layers, self.counts, strict=True):
                layer.router.bias.add_(
                    self.objective.load_balancing_weight * is_finite * (counts.mean() - counts).sign()
                )
        self.counts = None
