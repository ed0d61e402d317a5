"""A finished model laid over many ranks. Model files know nothing of it: modules are changed from outside.

dp    torch's DistributedDataParallel
fsdp  torch's fully_shard (ZeRO-3), with dp as hybrid sharding
tp    torch's tensor parallel: DTensor weights of attention and MLP (arXiv:1909.08053); between them, and in the loss,
      each rank has a piece of every row (arXiv:2205.05198)
cp    rows in parts, keys and values gathered (as Llama 3 does, arXiv:2407.21783, section 3.3.2)
ep    experts on different ranks, tokens sent to them (arXiv:2006.16668)
pp    blocks on different ranks, rows passed through them (arXiv:1811.06965): train/pipeline.py
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.model.mlp import Moe
from oneblock.parallel import pipeline
from oneblock.parallel.expert import ShardedExperts
from oneblock.parallel.mesh import Mesh
from oneblock.parallel.world import World
from oneblock.spec import Spec
from oneblock.train.loop import ModelWithLoss
from oneblock.train.options import Train


def check(spec: Spec, context: int, options: Train, mesh: Mesh) -> None:
    """What cannot be divided, or not together. OneblockError with the numbers that disagree."""
    if mesh.size > 1 and options.loop.seconds is not None:
        raise OneblockError("ranks' clocks differ: give --steps, not --seconds")
    pieces = {"2 x cp": 2 * mesh.cp if mesh.cp > 1 else 1, "tp": mesh.tp}
    if context % (whole := math.prod(pieces.values())):
        by = " x ".join(name for name, n in pieces.items() if n > 1)
        raise OneblockError(f"rows of {context} tokens do not divide by {by} = {whole}: change --context")
    if mesh.cp > 1 and options.documents:
        raise OneblockError("cp and --documents do not go together yet: leave one of them out")
    if mesh.size > 1 and options.optimizer.optimizer != "adamw" and (mesh.fsdp > 1 or mesh.tp > 1 or mesh.ep > 1):
        raise OneblockError(f"--optimizer {options.optimizer.optimizer} needs whole tensors: use dp or cp, or adamw")
    if mesh.pp > 1:
        pipeline.check(spec, mesh)
    check_layers(spec, mesh)


def check_layers(spec: Spec, mesh: Mesh) -> None:
    mixtures = [x.mlp for x in spec.layers if not hasattr(x.mlp, "hidden_dim")]
    if mesh.ep > 1 and not mixtures:
        raise OneblockError("ep is for models with experts: this one has none")
    if mesh.ep > 1 and (mesh.fsdp > 1 or mesh.tp > 1):
        raise OneblockError("ep goes with dp and cp, not with fsdp or tp yet")
    for moe in mixtures:
        if moe.n_experts % mesh.ep:  # type: ignore[union-attr]
            raise OneblockError(f"{moe.n_experts} experts do not divide by ep = {mesh.ep}")  # type: ignore[union-attr]
    if mesh.tp == 1:
        return
    if mixtures:
        raise OneblockError("tp does not split experts yet: use ep, dp or fsdp")
    for layer in spec.layers:
        a = layer.attn
        if a.n_heads % mesh.tp or a.n_kv_heads % mesh.tp or layer.mlp.hidden_dim % mesh.tp:  # type: ignore[union-attr]
            hidden_dim = layer.mlp.hidden_dim  # type: ignore[union-attr]
            raise OneblockError(
                f"tp = {mesh.tp} does not divide {a.n_heads} heads, {a.n_kv_heads} KV heads or a width of {hidden_dim}"
            )
        if a.qk_norm == "full" or a.sinks:
            raise OneblockError("tp does not split norms over all heads, nor sinks: use dp or fsdp")


def apply(model: Decoder, world: World) -> None:
    """Lay a model over the ranks, before an optimizer is made for it."""
    mesh = world.mesh
    if mesh.pp > 1:
        pipeline.cut(model, world)
    if mesh.tp > 1:
        for block in model.blocks:
            split_matrices(block, world)
        model.embedded = Pieces(model, world)
    if mesh.ep > 1:
        for module in [m for m in model.modules() if isinstance(m, Moe)]:
            module.experts = ShardedExperts(module.experts, world)  # type: ignore[assignment]
    if mesh.cp > 1:
        model.hidden_states = Gathering(model, world)
    if world.size > 1 and not world.copies and world.averaged > 1:
        shard(model, world)


def shard(model: Decoder, world: World) -> None:
    """Tensors in parts on `fsdp` ranks. Of one, with tp: whole ones whose gradients are exchanged in the same way."""
    mesh = world.mesh
    over = world.sharded["replicas", "shards"] if mesh.dp * mesh.cp > 1 else world.sharded["shards"]
    for block in model.blocks:
        fully_shard(block, mesh=over)
    fully_shard(model, mesh=over, reshard_after_forward=False)  # the loss reads its head after the forward pass
    register_fsdp_forward_method(model, "hidden_states")


def wrap(learner: ModelWithLoss, world: World) -> nn.Module:
    """What exchanges gradients while the backward pass is under way; experts keep theirs."""
    if not world.copies:
        return learner
    apart = [name for name, p in learner.named_parameters() if isinstance(p, DTensor | pipeline.RemoteParameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, apart)
    skips = any(layer.attn.cross for layer in learner.model.spec.layers)  # cross-attention, where there is no image
    return DistributedDataParallel(
        learner,
        process_group=world.groups["dp"] if world.mesh.pp > 1 else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=skips,
    )


def settle(model: nn.Module) -> None:
    """Give back the whole tensors that looking at a model leaves behind: parameters are shards again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


# ------------------------------------------------------------------ tp


def split_matrices(block: nn.Module, world: World) -> None:
    """Each rank has some heads and some of the MLP's hidden numbers; what they write is added up, a piece on each."""
    here, whole = Shard(1), Replicate()
    row = RowwiseParallel(output_layouts=here)
    plan: dict[str, Any] = {f"attn.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    plan |= {f"mlp.{name}": ColwiseParallel() for name in ("gate", "up") if getattr(block.mlp, name) is not None}
    plan |= {"attn.wo": row, "mlp.down": row}
    for name, others in (("attn", 2), ("mlp", 1)):
        none = (None,) * others
        plan[name] = PrepareModuleInput(input_layouts=(here, *none), desired_input_layouts=(whole, *none))
    parallelize_module(block, world.sharded["tp"], plan)


class Pieces:
    """`model.embedded` of this rank's piece of every row."""

    def __init__(self, model: Decoder, world: World):
        self.embedded, self.parts, self.part = model.embedded, world.mesh.tp, world.place["tp"]

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedded(*(x.chunk(self.parts, 1)[self.part] for x in (ids, positions)))


# ------------------------------------------------------------------ cp


class Gathering:
    """`model.hidden` of parts of rows: while positions are given, keys come from all ranks of the row."""

    def __init__(self, model: Decoder, world: World):
        self.hidden_states, self.group = model.hidden_states, world.groups["cp"]

    def __call__(self, ids: Tensor, *, positions: Tensor | None = None, **rest: Any) -> Tensor:
        if positions is None or rest.get("cache") is not None:
            return self.hidden_states(ids, positions=positions, **rest)
        return self.hidden_states(ids, positions=positions, **{**rest, "cache": AllGatherKV(self.group)})


class AllGatherKV:
    """Keys and values of whole rows, of which each rank makes a part: a cache that forgets, as the model sees it."""

    length, padded = 0, False

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.positions = group, torch.empty(0)

    def begin(self, positions: Tensor) -> None:
        self.positions = gather(positions.contiguous(), self.group, 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return gather(k, self.group, 2), gather(v, self.group, 2)

    def key_positions(self, layer: int) -> Tensor:
        return self.positions

    def end(self) -> None:
        pass


def gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return Gather.apply(x, group, dim)


class Gather(torch.autograd.Function):
    """Every rank's part of a tensor along one dimension; the gradient of a part is the sum of what all ranks say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.size = group, dim, x.shape[dim]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        whole = grads[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return whole.narrow(ctx.dim, dist.get_rank(ctx.group) * ctx.size, ctx.size), None, None
