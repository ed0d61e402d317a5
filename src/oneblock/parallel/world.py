"""This process's place among those that train together: alone, unless torchrun started several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from oneblock.data.packed import IGNORE, Batch
from oneblock.model import Decoder
from oneblock.parallel.mesh import KEYS, Mesh, parse_mesh
from oneblock.parallel.process_group import joined, started


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
        ranks = torch.arange(self.size).view(mesh.pp * mesh.dp * mesh.ep * mesh.cp, mesh.fsdp, mesh.tp)
        return DeviceMesh(self.device, ranks, mesh_dim_names=("replicas", "shards", "tp"))

    @cached_property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """By name, of the ranks that differ from this one in that way alone. Collective."""
        ranks = torch.arange(self.size).view(self.mesh.shape)
        wanted = {
            "same_experts": ("dp", "cp"),
            "ep": ("ep",),
            "cp": ("cp",),
            "tp": ("tp",),
            "pp": ("pp",),
            "dp": ("dp",),
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
        """Over how many ranks the backward pass averages gradients: those that have the same part of the weights."""
        return self.size // (self.mesh.tp * self.mesh.pp)

    @property
    def copies(self) -> bool:
        """Whether weights are copies of each other but for experts: DistributedDataParallel then serves them best."""
        return self.averaged > 1 and self.mesh.fsdp == self.mesh.tp == 1

    @property
    def judges(self) -> bool:
        """Whether it has the targets: of a pipeline, the last stage."""
        return self.place["pp"] == self.mesh.pp - 1

    def split(self, batch: Batch) -> Batch:
        """This process's part of the rows it reads.

        Of `cp` ranks each has two pieces of every row, from both ends, so that all attend alike. Of `tp` ranks each
        has the same ids, and a piece of the targets. Rows that do not divide get more ids, without targets.
        """
        mesh = self.mesh
        if mesh.cp == mesh.tp == 1:
            return batch if self.judges else without_targets(batch)
        batch = lengthened(batch, (2 * mesh.cp if mesh.cp > 1 else 1) * mesh.tp)
        if mesh.cp > 1:
            mine = zigzag(batch.ids.shape[1], self.place["cp"], mesh.cp)
            batch = replace(batch, ids=batch.ids[:, mine], targets=batch.targets[:, mine], positions=mine[None])
        targets = batch.targets.chunk(mesh.tp, 1)[self.place["tp"]]
        return replace(batch, targets=targets, count=int((targets != IGNORE).sum()))

    def share(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Of batches that every process has, the part of this one: as many for each, some of them without targets."""
        waiting = iter(batches)
        while found := list(islice(waiting, self.data_ranks)):
            mine = self.data_rank
            yield self.split(found[mine] if mine < len(found) else without_targets(found[0]))

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks, each of which has its own targets."""
        if self.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    @property
    def whole(self) -> bool:
        """Whether every rank has all of the weights."""
        return self.mesh.fsdp == self.mesh.tp == self.mesh.ep == self.mesh.pp == 1

    def agree(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def syncing(self, learner: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around one batch's backward pass: gradients go to all copies with the last of a step.

        Shards add theirs up with every batch, so that whole gradients are never kept.
        """
        if isinstance(learner, DistributedDataParallel):
            return nullcontext() if last else learner.no_sync()
        for module in learner.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(last, recurse=False)
        return nullcontext()

    @torch.no_grad()
    def exchange(self, model: Decoder) -> None:
        """Add up gradients over ranks, where the backward pass has not done so."""
        if self.mesh.pp > 1 and model.spec.tied:  # the first stage has its gradient as embedding, the last as head
            p = model.embed.weight
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(grad, group=self.groups["pp"])
        for p in model.parameters() if self.mesh.ep * self.mesh.tp > 1 else ():
            if p.grad is None:
                continue
            names, here = laid_over(p), p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            if "ep" in names:
                dist.all_reduce(here, group=self.groups["same_experts"])
                here /= self.averaged
            elif "tp" not in names and self.mesh.tp > 1:
                dist.all_reduce(here, group=self.groups["tp"])

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients so that their norm, over all shards, is at most `limit`; the norm they had."""
        found = [p for p in parameters if p.grad is not None]
        if self.mesh.pp > 1:
            return self._clip_stages(found, limit)
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

    def _clip_stages(self, found: list[nn.Parameter], limit: float) -> Tensor:
        """The same for stages of a pipeline; a matrix that two of them have counts once."""
        own = [p.grad for p in found if p.grad is not None and not p.again]  # type: ignore[attr-defined]
        squares = torch.nn.utils.get_total_norm(own).square()
        dist.all_reduce(squares, group=self.groups["pp"])
        whole = squares.sqrt()
        torch.nn.utils.clip_grads_with_norm_(found, limit, whole)
        return whole


def laid_over(p: nn.Parameter) -> tuple[str, ...]:
    """The ways of sharing in which ranks have different parts of it."""
    return p.device_mesh.mesh_dim_names or () if isinstance(p, DTensor) else ()


def zigzag(length: int, part: int, parts: int) -> Tensor:
    """Places in a row: of 2 x parts pieces the one at `part`, and its fellow from the end."""
    pieces = torch.arange(length).chunk(2 * parts)
    return torch.cat((pieces[part], pieces[-1 - part]))


def lengthened(batch: Batch, multiple: int) -> Batch:
    """Rows with ids at their ends that nobody learns: what comes before does not see them."""
    more = -batch.ids.shape[1] % multiple

    def ended(x: Tensor | None, value: int) -> Tensor | None:
        return x if x is None or not more else F.pad(x, (0, more), value=value)

    ids, targets = ended(batch.ids, 0), ended(batch.targets, IGNORE)
    assert ids is not None
    assert targets is not None
    return Batch(ids, targets, batch.count, ended(batch.documents, -1), ended(batch.positions, 0))


def without_targets(batch: Batch) -> Batch:
    return replace(batch, targets=torch.full_like(batch.targets, IGNORE), count=0)


@contextmanager
def together(mesh: str, device: str) -> Iterator[World]:
    """The world that torchrun has started, or this process alone."""
    found = parse_mesh(mesh, started())
    with joined(device) as ranks:
        yield World(ranks.rank, found, device.partition(":")[0]) if ranks.size > 1 else World()
