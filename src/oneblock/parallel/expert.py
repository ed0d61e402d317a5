"""Experts on different ranks: tokens travel to them and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from oneblock.model.mlp import Experts
from oneblock.parallel.world import World


class ShardedExperts(nn.Module):
    """In the place of `Experts`: each rank of `ep` keeps an equal number of them, as shards of the whole tensors."""

    def __init__(self, experts: Experts, world: World):
        super().__init__()
        self.spec, self.group, self.ranks = experts.spec, world.groups["ep"], world.mesh.ep
        self.n_experts = experts.n_experts // self.ranks  # here
        first = world.place["ep"] * self.n_experts
        for name, p in list(experts.named_parameters(recurse=False)):
            mine = p.detach()[first : first + self.n_experts].clone()
            setattr(self, name, nn.Parameter(DTensor.from_local(mine, world.experts, [Shard(0)], run_check=False)))
        self.names = [name for name, _ in self.named_parameters()]
        self.local = Local(experts, self.n_experts)

    def forward(self, x: Tensor, expert: Tensor, dropout: float = 0.0) -> Tensor:
        """Each row of x (N, dim), sorted by its expert (N,), through that expert: (N, dim)."""
        sent = torch.bincount(expert // self.n_experts, minlength=self.ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        there, here = sent.tolist(), received.tolist()
        rows = exchange(x, there, here, self.group)
        ids = exchange(expert % self.n_experts, there, here, self.group)
        ids, order = ids.sort(stable=True)  # they come sorted by rank
        tensors = {name: getattr(self, name).to_local() for name in self.names}
        y = self.local(tensors, rows[order], ids, dropout)
        return exchange(y[order.argsort()], here, there, self.group)


class Local:
    """The experts' own forward with other tensors: a module without parameters of its own."""

    def __init__(self, experts: Experts, count: int):
        self.module = Experts(experts.spec, count, experts.up.shape[-1]).to("meta")

    def __call__(self, tensors: dict[str, Tensor], x: Tensor, expert: Tensor, dropout: float) -> Tensor:
        return torch.func.functional_call(self.module, tensors, (x, expert, dropout))


def exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to every rank and from every rank, so many each."""
    return Exchange.apply(x, sent, received, group)


class Exchange(torch.autograd.Function):
    """Gradients travel the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        out = grads[0].new_empty(sum(sent), *grads[0].shape[1:])
        dist.all_to_all_single(out, grads[0].contiguous(), sent, received, group=group)
        return out, None, None, None
