"""Pipeline parallelism (arXiv:1811.06965): each stage runs some of the blocks, and micro-batches pass through them.

A stage receives activations where its first block begins and sends them where its last block ends; gradients travel
back. All micro-batches run forward, then all backward in reverse order, as autograd runs the latest first. The last
stage has the targets; the loss of the others is zero, from which their backward pass starts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.parallel.collectives import recv, send
from oneblock.parallel.mesh import Mesh
from oneblock.parallel.world import World
from oneblock.spec import Moe, Spec

MICRO_BATCHES = 4  # per stage; the bubble is about 1 / (1 + MICRO_BATCHES) of a step


def check_stages(spec: Spec, mesh: Mesh) -> None:
    """OneblockError if the model cannot be split into mesh.pp stages."""
    if mesh.size > mesh.pp * mesh.dp:
        raise OneblockError(f"pp={mesh.pp} is supported with dp alone, not in {mesh}; use pp and dp only")
    if mesh.pp > spec.n_layers:
        raise OneblockError(f"pp={mesh.pp} stages need at least as many layers, and the model has {spec.n_layers}")
    if any(isinstance(x.mlp, Moe) or x.attn.cross for x in spec.layers):
        raise OneblockError("pp does not support MoE or cross-attention models; use dp, ep or fsdp")


def stage_of(name: str, spec: Spec, stages: int) -> int:
    """Return the stage of a parameter: embeddings first, blocks in equal runs, final norm and head last."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) * stages // spec.n_layers
    return 0 if name.startswith(("embed.", "positions.")) else stages - 1


class RemoteParameter(nn.Parameter):
    """A placeholder without memory for a parameter that another stage holds."""


class RemoteBlock(nn.Module):
    """A placeholder for a block of another stage, with the same parameter names: the identity."""

    def __init__(self, block: nn.Module, peer: int = -1):
        self.__dict__.update(block.__dict__)
        self.peer = peer  # the rank of that stage, where activations pass

    def forward(self, x: Tensor, ctx: Any, layer: int) -> Tensor:
        return x


class RecvActivations(RemoteBlock):
    """The last block of the previous stage: its output is received."""

    def forward(self, x: Tensor, ctx: Any, layer: int) -> Tensor:
        return recv(x, self.peer)


class SendActivations(RemoteBlock):
    """The first block of the next stage: its input is sent."""

    def forward(self, x: Tensor, ctx: Any, layer: int) -> Tensor:
        return send(x, self.peer)


class PipelineStage(Decoder):
    """A decoder that holds one stage of another decoder and runs each batch in micro-batches."""

    def __init__(self, decoder: Decoder, world: World):
        self.__dict__.update(decoder.__dict__)
        self.micro_batches = MICRO_BATCHES * world.mesh.pp
        self.drop_remote_parameters(world)
        stage, ranks = world.coordinates["pp"], world.pipeline_ranks
        own = [i for i in range(len(self.blocks)) if stage_of(f"blocks.{i}", self.spec, len(ranks)) == stage]
        for i, block in enumerate(self.blocks):
            if i == own[0] - 1:
                self.blocks[i] = RecvActivations(block, ranks[stage - 1])
            elif i == own[-1] + 1:
                self.blocks[i] = SendActivations(block, ranks[stage + 1])
            elif i not in own:
                self.blocks[i] = RemoteBlock(block)

    def drop_remote_parameters(self, world: World) -> None:
        """Replace other stages' parameters by placeholders. `owner_rank` is the rank that writes one to checkpoints."""
        stages, stage = world.mesh.pp, world.coordinates["pp"]
        ranks = torch.arange(world.size).view(stages, -1)[:, 0].tolist()
        for name, p in list(self.named_parameters()):
            owner = stage_of(name, self.spec, stages)
            is_tied_head = self.spec.tied and name == "embed.weight" and stage == stages - 1
            if owner != stage and not is_tied_head:
                p = RemoteParameter(p.detach().new_zeros(()).expand(p.shape), requires_grad=False)
                module, _, key = name.rpartition(".")
                setattr(self.get_submodule(module), key, p)
            p.owner_rank, p.is_tied_copy = ranks[owner], is_tied_head  # type: ignore[attr-defined]
        self.tie()

    def hidden_states(
        self, ids: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None, **options: Any
    ) -> Tensor:
        rows, outputs = -(-len(ids) // self.micro_batches), []
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            outputs.append(
                super().hidden_states(
                    ids[part],
                    positions=positions if positions is None or len(positions) == 1 else positions[part],
                    documents=None if documents is None else documents[part],
                    **options,
                )
            )
        return torch.cat(outputs)
