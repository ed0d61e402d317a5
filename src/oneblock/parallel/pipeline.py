"""Pipeline parallel (arXiv:1811.06965): each rank has some of the blocks, and rows pass through the ranks in parts.

A stage receives the stream where the model would embed, and sends it where the model would norm it; gradients travel
the other way. All parts go forward, then all come back in the opposite order, as autograd goes first through what was
made last. The last stage has the targets: the others' losses are zeros, from which the backward pass begins.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.parallel.mesh import Mesh
from oneblock.parallel.world import World
from oneblock.spec import Moe, Spec
from oneblock.store.load import put

PARTS = 4  # of a batch's rows, for each stage: with more, stages wait less for each other (1 / (1 + PARTS) of the time)


def check(spec: Spec, mesh: Mesh) -> None:
    """OneblockError where a model has no such stages."""
    if mesh.size > mesh.pp * mesh.dp:
        raise OneblockError("pp goes with dp alone yet: leave out the others")
    if mesh.pp > spec.n_layers:
        raise OneblockError(f"pp = {mesh.pp} stages for {spec.n_layers} layers: each stage needs one")
    if any(isinstance(x.mlp, Moe) or x.attn.cross for x in spec.layers):
        raise OneblockError("pp does not pass on what experts' losses or images need yet: use dp, ep or fsdp")


def stage_of(name: str, spec: Spec, stages: int) -> int:
    """Where a parameter is kept: embeddings on the first stage, blocks in equal runs, norm and head on the last."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) * stages // spec.n_layers
    return 0 if name.startswith(("embed.", "positions.")) else stages - 1


def kept_by(model: Decoder, world: World) -> dict[str, int]:
    """The rank that writes each parameter to checkpoints."""
    ranks = torch.arange(world.size).view(world.mesh.pp, -1)[:, 0].tolist()
    return {name: ranks[stage_of(name, model.spec, world.mesh.pp)] for name, _ in model.named_parameters()}


def cut(model: Decoder, world: World) -> None:
    """Leave this rank its stage; what it lacks stands there without memory, under its name and in its shape."""
    stages, here, spec = world.mesh.pp, world.place["pp"], model.spec
    owners = kept_by(model, world)
    for name, p in list(model.named_parameters()):
        shared = spec.tied and name == "embed.weight" and here == stages - 1  # read as the head
        if stage_of(name, spec, stages) != here and not shared:
            p = RemoteParameter(p.detach().new_zeros(()).expand(p.shape), requires_grad=False)
            put(model, name, p)
        p.kept_by, p.again = owners[name], shared  # type: ignore[attr-defined]
    model.tie()
    for layer, block in enumerate(model.blocks):
        if stage_of(f"blocks.{layer}", spec, stages) != here:
            block.forward = lambda x, step, layer: x
    line = torch.arange(world.size).view(stages, -1)[:, world.rank % (world.size // stages)].tolist()
    if here > 0:
        model.embedded = RecvActivations(spec.dim, model.dtype, line[here - 1])
    if here < stages - 1:
        model.norm.forward = SendActivations(line[here + 1])  # pyright: ignore[reportAttributeAccessIssue]
    model.hidden_states = MicroBatches(model, PARTS * stages)


class RemoteParameter(nn.Parameter):
    """A parameter that another stage has: all of its shape is one number."""


# ------------------------------------------------------------------ the way of the stream


class MicroBatches:
    """`model.hidden`, some rows at a time."""

    def __init__(self, model: Decoder, parts: int):
        self.hidden_states, self.parts = model.hidden_states, parts

    def __call__(
        self, ids: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None, **rest: Any
    ) -> Tensor:
        rows, found = -(-len(ids) // self.parts), []
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            at = positions if positions is None or len(positions) == 1 else positions[part]
            inside = None if documents is None else documents[part]
            found.append(self.hidden_states(ids[part], positions=at, documents=inside, **rest))
        return torch.cat(found)


class RecvActivations:
    """`model.embedded` of a later stage."""

    def __init__(self, dim: int, dtype: torch.dtype, peer: int):
        self.dim, self.dtype, self.peer = dim, dtype, peer

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        begin = torch.zeros((), dtype=self.dtype, device=ids.device, requires_grad=True)  # gradients end there
        return Received.apply(begin, (*ids.shape, self.dim), self.peer)


class SendActivations:
    """`model.norm` of an earlier stage."""

    def __init__(self, peer: int):
        self.peer = peer

    def __call__(self, x: Tensor) -> Tensor:
        return Sent.apply(x, self.peer)


class Received(torch.autograd.Function):
    """What the stage before has sent; its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, begin: Tensor, shape: tuple[int, ...], peer: int) -> Tensor:
        ctx.peer, x = peer, begin.new_empty(shape)
        dist.recv(x, peer)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        dist.send(grads[0].contiguous(), ctx.peer)
        return None, None, None


class Sent(torch.autograd.Function):
    """The same numbers, which the next stage has now too; the gradient is the one that comes from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peer: int) -> Tensor:
        ctx.peer = peer
        dist.send(x.contiguous(), peer)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.recv(found, ctx.peer)
        return found, None
