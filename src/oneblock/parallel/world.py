"""This rank's place in the mesh, its process groups, and the reductions of one training step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from oneblock.model import Decoder
from oneblock.parallel.mesh import KEYS, Mesh, parse_mesh
from oneblock.parallel.process_group import ProcessGroup, init_process_group, torchrun_world_size


@dataclass(frozen=True)
class World:
    """One rank of a mesh; by default a single process."""

    rank: int = 0
    mesh: Mesh = field(default_factory=Mesh)
    device: str = "cpu"

    @property
    def size(self) -> int:
        return self.mesh.size

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what concerns all."""
        return self.rank == 0

    @cached_property
    def coordinates(self) -> dict[str, int]:
        """Its index along each dimension of the mesh."""
        indices = torch.unravel_index(torch.tensor(self.rank), self.mesh.shape)
        return {key: int(i) for key, i in zip(KEYS, indices, strict=True)}

    @property
    def data_rank(self) -> int:
        """Its index among the ranks that read different rows."""
        at = self.coordinates
        return (at["dp"] * self.mesh.ep + at["ep"]) * self.mesh.fsdp + at["fsdp"]

    @property
    def data_ranks(self) -> int:
        return self.mesh.data_ranks

    @property
    def pipeline_ranks(self) -> list[int]:
        """The ranks of its pipeline, by stage."""
        per_stage = self.size // self.mesh.pp
        return list(range(self.rank % per_stage, self.size, per_stage))

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates["pp"] == self.mesh.pp - 1

    @property
    def grad_divisor(self) -> int:
        """Number of ranks over which the backward pass averages gradients: those with the same shard of the weights."""
        return self.size // (self.mesh.tp * self.mesh.pp)

    @property
    def uses_ddp(self) -> bool:
        """Whether weights are replicated, experts aside, so that DistributedDataParallel serves them."""
        return self.grad_divisor > 1 and self.mesh.fsdp == self.mesh.tp == 1

    @property
    def has_full_weights(self) -> bool:
        """Whether every rank holds the whole model."""
        return self.mesh.fsdp == self.mesh.tp == self.mesh.ep == self.mesh.pp == 1

    # ------------------------------------------------------------------ groups

    @cached_property
    def fsdp_tp_mesh(self) -> DeviceMesh:
        """(replicas, shards, tp): the device mesh of FSDP and tensor parallelism. Collective."""
        mesh = self.mesh
        ranks = torch.arange(self.size).view(mesh.pp * mesh.dp * mesh.ep * mesh.cp, mesh.fsdp, mesh.tp)
        return DeviceMesh(self.device, ranks, mesh_dim_names=("replicas", "shards", "tp"))

    @cached_property
    def ep_mesh(self) -> DeviceMesh:
        return DeviceMesh.from_group(self.groups["ep"], self.device, mesh_dim_names=("ep",))

    @cached_property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The process group along each dimension; `expert_replicas` hold the same experts. Collective."""
        dims = {"expert_replicas": ("dp", "cp"), **{key: (key,) for key in ("ep", "cp", "tp", "pp", "dp")}}
        return {name: self._group(keys) for name, keys in dims.items()}

    def _group(self, keys: tuple[str, ...]) -> dist.ProcessGroup:
        """The ranks that differ from this one along `keys` alone; all ranks create all groups in the same order."""
        other = [i for i, key in enumerate(KEYS) if key not in keys]
        along = [i for i, key in enumerate(KEYS) if key in keys]
        ranks = torch.arange(self.size).view(self.mesh.shape).permute(*other, *along)
        groups = ranks.reshape(-1, math.prod(self.mesh.shape[i] for i in along)).tolist()
        own, _ = dist.new_subgroups_by_enumeration(groups)
        assert isinstance(own, dist.ProcessGroup)
        return own

    @property
    def tp_group(self) -> ProcessGroup:
        return ProcessGroup(self.coordinates["tp"], self.mesh.tp, self.groups["tp"])

    # ------------------------------------------------------------------ reductions

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks."""
        if self.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag))))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sync_grads(self, learner: nn.Module, is_last: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-batch's backward pass: replicas exchange gradients in the step's last one.

        Shards are reduce-scattered in every one, so that full gradients are never kept.
        """
        if isinstance(learner, DistributedDataParallel):
            return nullcontext() if is_last else learner.no_sync()
        for module in learner.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(is_last, recurse=False)
        return nullcontext()

    @torch.no_grad()
    def all_reduce_grads(self, model: Decoder, *others: nn.Module) -> None:
        """Sum the gradients that neither DDP nor FSDP reduces: tied embeddings, experts, and what tp replicates."""
        if self.mesh.pp > 1 and model.spec.tied:  # the first stage has the embedding's gradient, the last the head's
            p = model.embed.weight
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(grad, group=self.groups["pp"])
        modules = (model, *others) if self.mesh.ep * self.mesh.tp > 1 else ()
        for p in (p for module in modules for p in module.parameters()):
            if p.grad is None:
                continue
            dims, grad = sharded_dims(p), p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            if "ep" in dims:
                dist.all_reduce(grad, group=self.groups["expert_replicas"])
                grad /= self.grad_divisor
            elif "tp" not in dims and self.mesh.tp > 1:
                dist.all_reduce(grad, group=self.groups["tp"])

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients to a global norm of at most `max_norm`; return the norm before."""
        params = [p for p in parameters if p.grad is not None]
        if self.size == 1:
            return torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
        by_mesh: dict[object, list[nn.Parameter]] = {}
        for p in params:
            key = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            by_mesh.setdefault(key, []).append(p)
        if self.mesh.pp > 1:
            total = self._norm_over_stages(params)
        else:
            total = torch.stack([total_norm(group) for group in by_mesh.values()]).norm()
        for group in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
        return total

    def _norm_over_stages(self, params: list[nn.Parameter]) -> Tensor:
        """Return the gradient norm over pipeline stages; a tied matrix counts once."""
        squares = total_norm([p for p in params if not getattr(p, "is_tied_copy", False)]).square()
        dist.all_reduce(squares, group=self.groups["pp"])
        return squares.sqrt()


def total_norm(params: list[nn.Parameter]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sharded_dims(p: nn.Parameter) -> tuple[str, ...]:
    """The mesh dimensions over which a parameter is sharded."""
    return p.device_mesh.mesh_dim_names or () if isinstance(p, DTensor) else ()


@contextmanager
def init_world(mesh: str, device: str) -> Iterator[World]:
    """Join the ranks that torchrun started, laid out as `mesh`, or yield a single process."""
    parsed = parse_mesh(mesh, torchrun_world_size())
    with init_process_group(device) as ranks:
        yield World(ranks.rank, parsed, device.partition(":")[0]) if ranks.size > 1 else World()
