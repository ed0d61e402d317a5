"""Mixtures of experts in training: who was sent where, and what keeps the load even.

Shapes: L layers with experts, N tokens, E experts, k experts a token goes to. Watched from outside, by hooks on the
routers: the model knows nothing of it.
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

Sum = Callable[[Tensor], Tensor]  # over all ranks that read different tokens


class Routing:
    """The routers' answers of the latest forward pass, and the tokens each expert got in this step."""

    def __init__(self, model: Decoder, objective: Objective, total: Sum = lambda x: x):
        self.layers = [m for m in model.modules() if isinstance(m, Moe)]
        self.objective, self.total = objective, total
        self.logits: dict[int, Tensor] = {}  # by layer, (N, E); computing a layer again writes the same once more
        self.counts: Tensor | None = None  # (L, E), of all batches of the step so far
        for i, layer in enumerate(self.layers):
            layer.router.register_forward_hook(self._keep(i))
        if objective.load_balancing == "bias" and self.layers:
            self._take_biases()

    def _keep(self, i: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, args: Any, logits: Tensor) -> None:
            self.logits[i] = logits

        return keep

    def _take_biases(self) -> None:
        if any(layer.router.bias is None for layer in self.layers):
            raise OneblockError(
                "--load-balancing bias moves the routers' biases, and this model's have none: use --load-balancing loss"
            )
        for layer in self.layers:
            layer.router.bias.requires_grad_(False)

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What to add to the loss, and what to show: of the latest forward pass. Counts are added up for `steer`."""
        chosen, shares, sums = zip(*(self._layer(i) for i in range(len(self.layers))), strict=True)
        counts = self.total(torch.stack(chosen))  # (L, E)
        load = counts / counts.sum(-1, keepdim=True)
        even = load.shape[-1] * (load * torch.stack(shares)).sum(-1).mean()  # 1 where the load is even
        z = torch.stack(sums).mean()
        self.counts = counts if self.counts is None else self.counts + counts
        o = self.objective
        extra = o.router_z_loss * z + (o.load_balancing_weight * even if o.load_balancing == "loss" else 0.0)
        return extra, {"load_balancing_loss": even.detach(), "load": load}

    def _layer(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one layer: tokens each expert got (E,), the mean of the routers' shares (E,), and the z-loss."""
        spec, logits = self.layers[i].spec, self.logits[i].float()
        scores = logits.softmax(-1) if spec.score_func == "softmax" else logits.sigmoid()
        index = scores.topk(spec.top_k, -1).indices
        counts = torch.zeros(spec.n_experts, device=logits.device)
        counts = counts.scatter_add(0, index.flatten(), torch.ones(index.numel(), device=logits.device))
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        return counts, shares, logits.logsumexp(-1).square().mean()

    @torch.no_grad()
    def update_expert_bias(self, good: Tensor) -> None:
        """After a good step: more bias for experts that got too few tokens, less for those that got too many."""
        if self.objective.load_balancing == "bias" and self.counts is not None:
            for layer, counts in zip(self.layers, self.counts, strict=True):
                layer.router.bias.add_(self.objective.load_balancing_weight * good * (counts.mean() - counts).sign())
        self.counts = None
