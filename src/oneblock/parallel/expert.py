"""Expert parallelism (arXiv:2006.16668): each rank holds some experts, and tokens are sent to their experts' ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from oneblock.kernels.fast_model import GroupedExperts
from oneblock.model.mlp import Experts
from oneblock.parallel.collectives import all_to_all
from oneblock.parallel.world import World


class ShardedExperts(nn.Module):
    """Drop-in for `Experts`: each of the ep ranks holds an equal share, as DTensor shards of the stacked weights."""

    def __init__(self, experts: Experts, world: World):
        super().__init__()
        self.group, self.ranks = world.groups["ep"], world.mesh.ep
        self.n_experts = experts.n_experts // self.ranks  # on this rank
        first = world.coordinates["ep"] * self.n_experts
        for name, p in list(experts.named_parameters(recurse=False)):
            shard = p.detach()[first : first + self.n_experts].clone()
            setattr(self, name, nn.Parameter(DTensor.from_local(shard, world.ep_mesh, [Shard(0)], run_check=False)))
        self.names = [name for name, _ in self.named_parameters()]
        with torch.device("meta"):  # in a tuple, so that its parameters are not this module's
            self.local = (GroupedExperts(experts.spec, self.n_experts, experts.up.shape[-1]),)

    def forward(self, x: Tensor, expert: Tensor, dropout: float = 0.0) -> Tensor:
        """Run each row of x (N, dim), sorted by its expert (N,), through that expert: (N, dim)."""
        sent = torch.bincount(expert // self.n_experts, minlength=self.ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        send_counts, recv_counts = sent.tolist(), received.tolist()
        rows = all_to_all(x, send_counts, recv_counts, self.group)
        ids = all_to_all(expert % self.n_experts, send_counts, recv_counts, self.group)
        ids, order = ids.sort(stable=True)  # received sorted by rank
        shards = {name: getattr(self, name).to_local() for name in self.names}
        y = torch.func.functional_call(self.local[0], shards, (rows[order], ids, dropout))
        return all_to_all(y[order.argsort()], recv_counts, send_counts, self.group)
