"""This process's place among those that train together: alone, unless torchrun started several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from oneblock.data.rows import Batch
from oneblock.errors import OneblockError
from oneblock.train.mesh import KEYS, Mesh, parse_mesh

PATIENCE = timedelta(seconds=60)  # that a rank waits for the others before it gives up


@dataclass(frozen=True)
class World:
    rank: int = 0
    mesh: Mesh = field(default_factory=Mesh)
    device: str = "cpu"

    @property
    def size(self) -> int:
        return self.mesh.size

    @property
    def first(self) -> bool:
        """Whether this process writes and prints what concerns all."""
        return self.rank == 0

    @cached_property
    def place(self) -> dict[str, int]:
        """Its index along each way of sharing."""
        found = torch.unravel_index(torch.tensor(self.rank), self.mesh.shape)
        return {key: int(i) for key, i in zip(KEYS, found, strict=True)}

    @property
    def data_rank(self) -> int:
        """Which share of a batch's rows this process reads."""
        return (self.place["dp"] * self.mesh.ep + self.place["ep"]) * self.mesh.fsdp + self.place["fsdp"]

    @property
    def data_ranks(self) -> int:
        return self.mesh.data

    # ------------------------------------------------------------------ groups

    @cached_property
    def sharded(self) -> DeviceMesh:
        """(replicas, shards, tp): what FSDP and tensor parallel lay their tensors over. Collective."""
        mesh = self.mesh
        ranks = torch.arange(self.size).view(mesh.dp * mesh.ep * mesh.cp, mesh.fsdp, mesh.tp)
        return DeviceMesh(self.device, ranks, mesh_dim_names=("replicas", "shards", "tp"))

    @cached_property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """By name: `tokens` all ranks with different tokens and the same part of the weights, and so on. Collective."""
        ranks = torch.arange(self.size).view(self.mesh.shape)
        wanted = {
            "tokens": ("dp", "ep", "cp", "fsdp"),
            "same_experts": ("dp", "cp", "fsdp"),
            "cp": ("cp",),
            "ep": ("ep",),
        }
        return {name: self._group(ranks, keys) for name, keys in wanted.items()}

    def _group(self, ranks: Tensor, keys: tuple[str, ...]) -> dist.ProcessGroup:
        """Of the ranks that differ from this one in `keys` alone; every rank makes every group, in one order."""
        apart = [i for i, key in enumerate(KEYS) if key not in keys]
        together = [i for i, key in enumerate(KEYS) if key in keys]
        each = ranks.permute(*apart, *together).reshape(
            -1, int(torch.tensor([self.mesh.shape[i] for i in together]).prod())
        )
        mine, _ = dist.new_subgroups_by_enumeration(each.tolist())
        assert isinstance(mine, dist.ProcessGroup)
        return mine

    @cached_property
    def experts(self) -> DeviceMesh:
        return DeviceMesh.from_group(self.groups["ep"], self.device, mesh_dim_names=("ep",))

    # ------------------------------------------------------------------ what the loop asks

    @property
    def averaged(self) -> int:
        """Over how many ranks the backward pass averages gradients, where it exchanges them by itself."""
        return self.size // self.mesh.tp if self.mesh.fsdp > 1 else self.size if self.copies else 1

    @property
    def copies(self) -> bool:
        """Whether ranks differ in their rows alone: torch's DistributedDataParallel then serves them best."""
        return self.size > 1 and self.mesh.dp == self.size

    def split(self, batch: Batch) -> Batch:
        """This process's part of the rows it reads: two pieces of each, from both ends, so that all attend alike."""
        cp = self.mesh.cp
        if cp == 1:
            return batch
        length, i = batch.ids.shape[1], self.place["cp"]
        piece = length // (2 * cp)
        mine = torch.cat([torch.arange(k * piece, (k + 1) * piece) for k in (i, 2 * cp - 1 - i)])
        targets = batch.targets[:, mine]
        return replace(
            batch, ids=batch.ids[:, mine], targets=targets, count=int((targets >= 0).sum()), positions=mine[None]
        )

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks that read different tokens."""
        if self.size == self.mesh.tp:
            return x
        x = x.clone()
        dist.all_reduce(x, group=self.groups["tokens"])
        return x

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    @property
    def whole(self) -> bool:
        """Whether every rank has all of the weights."""
        return self.mesh.fsdp == self.mesh.tp == self.mesh.ep == 1

    def agree(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def syncing(self, learner: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around one batch's backward pass: gradients are exchanged with the last of a step."""
        if isinstance(learner, DistributedDataParallel):
            return nullcontext() if last else learner.no_sync()
        if self.mesh.fsdp > 1:
            for module in learner.modules():
                if hasattr(module, "set_requires_gradient_sync"):
                    module.set_requires_gradient_sync(last, recurse=False)  # type: ignore[operator]
        return nullcontext()

    def exchange(self, model: nn.Module) -> None:
        """Add up gradients over ranks, where the backward pass has not done so."""
        if self.size == self.mesh.tp or self.averaged > 1:
            return
        for p in model.parameters():
            if p.grad is not None:
                here = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                dist.all_reduce(here, group=self.groups["same_experts" if of_experts(p) else "tokens"])

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients so that their norm, over all shards, is at most `limit`; the norm they had."""
        found = [p for p in parameters if p.grad is not None]
        if self.size == 1:
            return torch.nn.utils.clip_grad_norm_(found, limit, foreach=True)
        alike: dict[object, list[nn.Parameter]] = {}
        for p in found:
            key = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            alike.setdefault(key, []).append(p)
        norms = []
        for part in alike.values():
            norm = torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        whole = torch.stack(norms).norm()
        for part in alike.values():
            torch.nn.utils.clip_grads_with_norm_(part, limit, whole)
        return whole


def of_experts(p: nn.Parameter) -> bool:
    return isinstance(p, DTensor) and p.device_mesh.mesh_dim_names == ("ep",)


def started() -> int:
    """How many ranks torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def together(mesh: str, device: str) -> Iterator[World]:
    """The world that torchrun has started, or this process alone. What a lost rank does to the others is one line."""
    size = started()
    found = parse_mesh(mesh, size)
    if size == 1:
        yield World()
        return
    rank, kind = int(os.environ["RANK"]), device.partition(":")[0]
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(rank, found, kind)
        dist.barrier()
    except (RuntimeError, dist.DistError) as e:
        if isinstance(e, OneblockError):
            raise
        raise OneblockError(f"rank {rank} of {size} lost the others or failed: {str(e).strip().splitlines()[0]}") from e
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
