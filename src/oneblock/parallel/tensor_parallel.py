"""Tensor parallelism (arXiv:1909.08053), for training and inference: each rank holds some heads and some of the MLP.

wq wk wv gate up are column-parallel: output features are split. wo and down are row-parallel: input features are split
and the partial outputs are summed over ranks. Embeddings, the head, norms and routers are replicated.

inference  weights are plain or quantized copies of a slice, so the unsharded model can be freed; outputs are
           all-reduced. All ranks sample the same tokens from the same seed.
training   weights are DTensors over the tp mesh, as checkpoints, FSDP and gradient clipping need them. Between
           sublayers, and in the loss, each rank has a chunk of every sequence (sequence parallelism, arXiv:2205.05198):
           inputs are all-gathered, outputs reduce-scattered.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock import spec as s
from oneblock.errors import OneblockError
from oneblock.kernels.linear import COLUMNS, ROWS, frozen_copy, slice_linear
from oneblock.model import Decoder
from oneblock.model.attention import Attention
from oneblock.model.decoder import Block
from oneblock.model.mlp import Experts, Mlp, Moe
from oneblock.parallel.collectives import Group, Op, all_gather, reduce_scatter
from oneblock.parallel.process_group import ProcessGroup
from oneblock.quant.modules import QuantizedExperts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh  # slow to import: training only

ROW_PARALLEL = ("wo", "down")
MOST_SUGGESTED = 64  # the largest tp that an error suggests


class RowParallelLinear(nn.Module):
    """A linear layer with split input features: partial outputs are summed over ranks, then the bias is added."""

    bias: Tensor | None
    reduce: Op

    def __init__(self, linear: nn.Module, reduce: Op):
        super().__init__()
        if isinstance(linear, nn.Linear):
            self.weight = linear.weight  # listed here first, so that its name stays `wo.weight`
        self.bias, linear.bias = linear.bias, None  # type: ignore[assignment]
        self.linear, self.reduce = linear, reduce

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.linear(x))
        return y if self.bias is None else y + self.bias.type_as(y)


class AllReduceOutput(nn.Module):
    """A module whose outputs are partial sums: they are summed over ranks."""

    reduce: Op

    def __init__(self, module: nn.Module, reduce: Op):
        super().__init__()
        self.module, self.reduce = module, reduce

    def forward(self, *args: Any) -> Tensor:
        return self.reduce(self.module(*args))


class DTensorLinear(nn.Linear):
    """A linear layer that holds DTensors and multiplies by its local shard."""

    def __init__(self, linear: nn.Linear, dim: int, mesh: DeviceMesh):
        from torch.distributed.tensor import DTensor, Shard

        super().__init__(linear.in_features, linear.out_features, device="meta")
        for name, p in (("weight", linear.weight), ("bias", linear.bias)):
            replicated = p is None or (name == "bias" and dim == COLUMNS)  # RowParallelLinear takes this bias
            shard = p if replicated else DTensor.from_local(p.detach(), mesh, [Shard(dim)], run_check=False)
            self.register_parameter(name, None if shard is None else nn.Parameter(shard))

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to_local()  # type: ignore[attr-defined]
        return F.linear(input, self.weight.to_local(), bias)  # type: ignore[attr-defined]


class TensorParallel:
    """Shards a decoder's blocks in place over the ranks of one tp group. With a `mesh`: for training."""

    def __init__(self, ranks: ProcessGroup, mesh: DeviceMesh | None = None):
        self.ranks, self.mesh = ranks, mesh
        self.reduce = partial(all_reduce, ranks.group)
        if mesh is not None:  # a compiled graph breaks at these collectives, which cannot be traced
            self.reduce = cast(Op, torch.compiler.disable(partial(reduce_scatter, group=ranks.group, dim=1)))

    def shard_decoder(self, model: Decoder) -> None:
        """Give every block this rank's slice of its weights, copied. Before `optimize_for_cpu`."""
        check_divisibility(model.spec, self.ranks.size, training=self.mesh is not None)
        for block in model.blocks:
            assert isinstance(block, Block)
            self.shard_attention(block.attn)
            if isinstance(block.mlp, Moe):
                self.shard_moe(block.mlp)
                block.mlp = AllReduceOutput(block.mlp, self.reduce)  # type: ignore[assignment]
            else:
                self.shard_mlp(block.mlp)
            if self.mesh is not None:
                for sublayer in (block.attn, block.mlp):
                    sublayer.register_forward_pre_hook(cast(Any, torch.compiler.disable(self.gather_sequence)))
        if self.mesh is not None:
            model.blocks[0].register_forward_pre_hook(self.split_sequence)

    def gather_sequence(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All-gather a sublayer's input (B, T / tp, dim) to (B, T, dim), in autocast's dtype."""
        x, device = args[0], args[0].device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return all_gather(x, self.ranks.group, 1), *args[1:]

    def split_sequence(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take this rank's chunk (B, T / tp, dim) of the embeddings (B, T, dim)."""
        return args[0].chunk(self.ranks.size, 1)[self.ranks.rank], *args[1:]

    def shard_attention(self, attn: Attention) -> None:
        a = attn.spec
        heads, kv_heads = self.own(a.n_heads), self.own(a.n_kv_heads)
        q, kv = (slice(x.start * a.head_dim, x.stop * a.head_dim) for x in (heads, kv_heads))
        self.shard_linears(attn, {"wq": q, "wk": kv, "wv": kv, "wo": q})
        if attn.sinks is not None:
            attn.sinks = frozen_copy(attn.sinks[heads])

    def shard_mlp(self, mlp: Mlp) -> None:
        self.shard_linears(mlp, dict.fromkeys(("gate", "up", "down"), self.own(mlp.spec.hidden_dim)))

    def shard_moe(self, moe: Moe) -> None:
        """Slice every expert's hidden features. Outputs stay partial sums; the first rank adds the biases."""
        hidden = self.own(moe.spec.expert.hidden_dim)
        if isinstance(moe.experts, QuantizedExperts):
            shard_quantized_experts(moe.experts, hidden, self.ranks.rank == 0)
        else:
            shard_experts(moe.experts, hidden, self.ranks.rank == 0)
        if moe.shared is not None:
            self.shard_mlp(moe.shared)
            moe.shared.down = self.partial_sum(moe.shared.down)

    def partial_sum(self, layer: nn.Module) -> Any:
        """Return the linear layer of a RowParallelLinear, with its bias on the first rank only."""
        assert isinstance(layer, RowParallelLinear)
        layer.linear.bias = None if self.ranks.rank else layer.bias  # type: ignore[assignment]
        return layer.linear

    def shard_linears(self, module: nn.Module, features: dict[str, slice]) -> None:
        for name, part in features.items():
            layer, dim = getattr(module, name), COLUMNS if name in ROW_PARALLEL else ROWS
            if layer is None:
                continue
            shard: nn.Module = slice_linear(layer, dim, part)
            if self.mesh is not None:
                assert isinstance(shard, nn.Linear)
                shard = DTensorLinear(shard, dim, self.mesh)
            setattr(module, name, RowParallelLinear(shard, self.reduce) if dim == COLUMNS else shard)

    def own(self, n: int) -> slice:
        """Return this rank's slice of n heads or features; if there are fewer than ranks, the one it shares."""
        start = self.ranks.rank * n // self.ranks.size
        return slice(start, start + max(n // self.ranks.size, 1))


def all_reduce(group: Group, x: Tensor) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


# ------------------------------------------------------------------ checks


def check_divisibility(spec: s.Spec, tp: int, training: bool = False) -> None:
    """OneblockError if the model cannot be split over tp ranks. Experts, sinks and shared KV heads: inference only."""
    for layer in spec.pattern if tp > 1 else ():
        check_support(layer, training)
        a, mlp = layer.attn, layer.mlp
        if training or (a.n_kv_heads % tp and tp % a.n_kv_heads):
            check_divides("number of KV heads", a.n_kv_heads, tp)
        check_divides("number of attention heads", a.n_heads, tp)
        mlps = (mlp,) if isinstance(mlp, s.Mlp) else (mlp.expert, *((mlp.shared,) if mlp.shared else ()))
        for part in mlps:
            check_divides("MLP intermediate size", part.hidden_dim, tp)


def check_support(layer: s.Layer, training: bool) -> None:
    a = layer.attn
    if a.qk_norm == "full":
        raise OneblockError("tp does not support QK norms over all heads; use dp or fsdp, or one rank for inference")
    if a.cross and not training:
        raise OneblockError("tp does not support cross-attention in inference; use one rank")
    if a.sinks and training:
        raise OneblockError("tp does not support attention sinks in training; use dp or fsdp")
    if isinstance(layer.mlp, s.Moe) and training:
        raise OneblockError("tp does not support MoE models in training; use ep, dp or fsdp")


def check_divides(name: str, n: int, degree: int, dim: str = "tp") -> None:
    """OneblockError, with the sizes that work, if n is not divisible by the degree of parallelism."""
    if n % degree:
        *divisors, last = [str(i) for i in range(1, min(n, MOST_SUGGESTED) + 1) if n % i == 0]
        choices = f"{', '.join(divisors)} or {last}" if divisors else last
        raise OneblockError(f"{name} {n} is not divisible by {dim}={degree}; use {dim}={choices}")


# ------------------------------------------------------------------ slices


def shard_quantized_experts(experts: QuantizedExperts, hidden: slice, add_bias: bool) -> None:
    for name, dim in (("gate", ROWS), ("up", ROWS), ("down", COLUMNS)):
        layers = getattr(experts, name)
        if layers is not None:
            setattr(experts, name, nn.ModuleList(slice_linear(layer, dim, hidden) for layer in layers))
    for layer in experts.down or () if not add_bias else ():
        layer.bias = None  # type: ignore[assignment]


def shard_experts(experts: Experts, hidden: slice, add_bias: bool) -> None:
    for name in ("gate", "up", "gate_bias", "up_bias"):
        stacked = getattr(experts, name)
        setattr(experts, name, None if stacked is None else frozen_copy(stacked[:, hidden]))
    experts.down = frozen_copy(experts.down[:, :, hidden])
    experts.down_bias = experts.down_bias if add_bias else None
