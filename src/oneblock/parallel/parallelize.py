"""A finished model laid out over a mesh for training: its modules are replaced by parallel ones.

dp    DistributedDataParallel
fsdp  fully_shard (ZeRO-3), with dp as hybrid sharding
tp    heads and MLP features split, sequence parallelism between sublayers: tensor_parallel.py
cp    sequences split, keys and values all-gathered: context_parallel.py
ep    experts sharded, tokens sent to them: expert.py
pp    blocks split into stages: pipeline.py
"""

from __future__ import annotations

import math

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.model.attention import Attention
from oneblock.model.mlp import Moe
from oneblock.parallel.context_parallel import ContextParallelDecoder
from oneblock.parallel.expert import ShardedExperts
from oneblock.parallel.mesh import Mesh
from oneblock.parallel.pipeline import PipelineStage, RemoteParameter, check_stages
from oneblock.parallel.tensor_parallel import TensorParallel, check_divides, check_divisibility
from oneblock.parallel.world import World
from oneblock.spec import Moe as MoeSpec
from oneblock.spec import Spec


def check_mesh(spec: Spec, context: int, mesh: Mesh) -> None:
    """OneblockError if the model, or sequences of `context` tokens, cannot be split over the mesh."""
    factors = {"2 x cp": 2 * mesh.cp if mesh.cp > 1 else 1, "tp": mesh.tp}
    if context % (multiple := math.prod(factors.values())):
        names = " x ".join(name for name, n in factors.items() if n > 1)
        raise OneblockError(
            f"sequences of {context} tokens are not divisible by {names} = {multiple}; "
            f"use --context {-(-context // multiple) * multiple}"
        )
    if mesh.pp > 1:
        check_stages(spec, mesh)
    if mesh.ep > 1:
        check_experts(spec, mesh)
    check_divisibility(spec, mesh.tp, training=True)


def check_experts(spec: Spec, mesh: Mesh) -> None:
    moes = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoeSpec)]
    if not moes:
        raise OneblockError(f"ep={mesh.ep} needs an MoE model, and this one has no experts; use dp or fsdp")
    if mesh.fsdp > 1 or mesh.tp > 1:
        raise OneblockError(f"ep={mesh.ep} is supported with dp and cp alone, not with fsdp or tp")
    for moe in moes:
        check_divides("number of experts", moe.n_experts, mesh.ep, "ep")


def parallelize(model: Decoder, world: World) -> Decoder:
    """Lay out a model over the mesh, before its optimizer is built; use the returned one, which shares its modules."""
    mesh = world.mesh
    if mesh.pp > 1:
        model = PipelineStage(model, world)
    if mesh.tp > 1:
        TensorParallel(world.tp_group, world.fsdp_tp_mesh["tp"]).shard_decoder(model)
    if mesh.ep > 1:
        for module in [m for m in model.modules() if isinstance(m, Moe)]:
            module.experts = ShardedExperts(module.experts, world)  # type: ignore[assignment]
    if mesh.cp > 1:
        model = ContextParallelDecoder(model, world.groups["cp"])
    if not world.uses_ddp and world.grad_divisor > 1:
        shard_fsdp(model, world)
    return model


def parallelize_submodules(parent: nn.Module, world: World) -> None:
    """Lay out what a task owns beside the model: decoders as the model is, other modules replicated or FSDP-sharded."""
    if world.size == 1:
        return
    if any(True for _ in parent.parameters(recurse=False)):
        raise OneblockError(f"{type(parent).__name__} has direct parameters: put them into a submodule")
    for name, child in list(parent.named_children()):
        if isinstance(child, Decoder):
            is_trained = any(p.requires_grad for p in child.parameters())  # sharding creates new parameters
            new = parallelize(child, world)
            setattr(parent, name, new if is_trained else new.requires_grad_(False))
        elif not world.uses_ddp and world.grad_divisor > 1:
            fully_shard(child, mesh=fsdp_mesh(world))


def fsdp_mesh(world: World) -> DeviceMesh:
    mesh = world.mesh
    return world.fsdp_tp_mesh["replicas", "shards"] if mesh.dp * mesh.cp > 1 else world.fsdp_tp_mesh["shards"]


def shard_fsdp(model: Decoder, world: World) -> None:
    """Shard tensors over fsdp ranks. With fsdp=1 and tp they stay whole, and gradients are reduced in the same way."""
    device_mesh = fsdp_mesh(world)
    for block in model.blocks:
        fully_shard(block, mesh=device_mesh)
    fully_shard(model, mesh=device_mesh, reshard_after_forward=False)  # the loss reads the head after the forward pass
    register_fsdp_forward_method(model, "hidden_states")


def wrap_ddp(learner: nn.Module, world: World) -> nn.Module:
    """Wrap a module so that replicas average gradients during the backward pass; sharded experts are left out."""
    if not world.uses_ddp:
        return learner
    ignored = [name for name, p in learner.named_parameters() if isinstance(p, DTensor | RemoteParameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, ignored)
    return DistributedDataParallel(
        learner,
        process_group=world.groups["dp"] if world.mesh.pp > 1 else None,
        gradient_as_bucket_view=True,
        # cross-attention is skipped without images
        find_unused_parameters=any(isinstance(m, Attention) and m.spec.cross for m in learner.modules()),
    )


def reshard(model: nn.Module) -> None:
    """Free the full tensors that a forward pass without a backward pass leaves: parameters are shards again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
