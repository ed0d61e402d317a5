"""A finished model made ready for a CPU: products that stream weights, one product for several, one operator for many.

Done from outside and in place; parameters and their names stay. Without kernels torch's products stand in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from oneblock.kernels.build import fits
from oneblock.model import Decoder
from oneblock.model.attention import MIDDLE, Attention, blocked_matmul
from oneblock.model.context import ForwardContext
from oneblock.model.decoder import Block
from oneblock.model.mlp import Mlp, activate
from oneblock.model.norm import Norm
from oneblock.quant.linear import MOST, QuantizedLinear, SkinnyGemmLinear, held, product

CURVE = 2 * (2 / math.pi) ** 0.5
# Activations that are x sigmoid(a x + b x^3): their a and b
SIGMOIDS = {"silu": (1.0, 0.0), "quick_gelu": (1.702, 0.0), "gelu_tanh": (CURVE, CURVE * 0.044715)}


class Project:
    """`Attention.project` as one product."""

    def __init__(self, attn: Attention):
        self.attn = attn

    def __call__(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = cast(Any, self.attn)
        if x is not source:  # of the last layer only some columns ask
            return attn.wq(x), attn.wk(source), attn.wv(source)
        q, k, v = product(x, (attn.wq, attn.wk, attn.wv))
        return q, k, v


def curve(mlp: Mlp) -> tuple[float, float] | None:
    """Its activation's a and b, where our operators have it."""
    return SIGMOIDS.get(mlp.spec.act) if mlp.spec.clamp is None and not mlp.spec.up_offset else None


class Inner:
    """`Mlp.inner` as one product and one operator."""

    def __init__(self, mlp: Mlp):
        self.mlp, self.curve = mlp, curve(mlp)

    def __call__(self, x: Tensor) -> Tensor:
        mlp = cast(Any, self.mlp)
        if mlp.gate is None:
            x, up = mlp.up(x), None
        elif alike(mlp.up, mlp.gate):
            up, x = product(x, (mlp.up, mlp.gate))
        else:
            up, x = mlp.up(x), mlp.gate(x)
        if self.curve is None or not alone(x):
            return activate(mlp.spec, x, None) if up is None else activate(mlp.spec, up, x)
        x = even(x)
        torch.ops.oneblock_rows.gate(x, None if up is None else even(up), *self.curve)
        return x


class Rest:
    """`Block.forward` of one token, all that comes after its attention as one operator."""

    def __init__(self, block: Block, curve: tuple[float, float]):
        self.block, self.forward, self.curve = block, block.forward, curve

    def __call__(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        block = cast(Any, self.block)
        norm, attn, mlp = block.mlp_in, block.attn, block.mlp
        layers = (attn.wo, mlp.gate, mlp.up, mlp.down) if mlp.gate is not None else (attn.wo, mlp.up, mlp.down)
        if x.shape[1] > 1 or not fits(x) or len(x) > MOST or norm.weight.dtype != x.dtype or not alike(*layers):
            return self.forward(x, ctx, layer)
        y = attn.mixed(block.attn_in(x), ctx, layer)
        how = norm.weight, norm.bias, *arguments(norm), *self.curve
        return torch.ops.oneblock_rows.rest(x.contiguous(), y.contiguous(), *held(layers), *how)


class Normed:
    """`Norm.forward` as one operator."""

    def __init__(self, norm: Norm):
        self.norm, self.forward = norm, norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not alone(x) or norm.weight.dtype != x.dtype:
            return self.forward(x)
        return torch.ops.oneblock_rows.norm(x.contiguous(), norm.weight, norm.bias, *arguments(norm))


def arguments(norm: Norm) -> tuple[float, float, bool, bool]:
    """What our operators ask of a norm beside its weights: eps, offset, centred, after."""
    spec, centred = norm.spec, norm.spec.kind == "layer"
    return spec.eps, spec.weight_offset, centred, not centred and not spec.scale_in_fp32


class Turn:
    """`Attention.turn` as one operator."""

    def __init__(self, attn: Attention):
        self.turn = attn.turn

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not alone(x) or x.stride(-1) != 1:
            return self.turn(x, cos, sin)
        return torch.ops.oneblock_rows.turned(x, cos.contiguous(), sin.contiguous())


class Read:
    """`Attention.read`: of one query each key is read once for all heads that share it, of many weights in one go."""

    def __init__(self, attn: Attention):
        self.attn, self.read = attn, attn.read
        self.scale = attn.spec.scale or attn.spec.head_dim**-0.5

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        if not fits(q) or k.dtype != q.dtype or ctx.documents is not None:
            return self.read(q, k, v, ctx, layer)
        a, keys = self.attn.spec, k.shape[2]
        if q.shape[2] == 1:
            seen = ctx.mask(a, layer, slice(0, 1), slice(0, keys))[:, 0, 0]
            return torch.ops.oneblock_rows.attend(q.contiguous(), k, v, seen.contiguous(), self.scale)
        if alone(q) and keys <= MIDDLE and ctx.sees(a, keys) in ("causal", "later"):
            return blocked_matmul(q, k, v, self.weigh)
        return self.read(q, k, v, ctx, layer)

    def weigh(self, q: Tensor, k: Tensor, groups: int) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2))
        torch.ops.oneblock_rows.weigh(scores, q.shape[1] // groups, self.scale)
        return scores


def alone(x: Tensor) -> bool:
    """Whether x goes through our operators, and is not part of a graph: that fuses better what is small."""
    return fits(x) and not torch.compiler.is_compiling()


def even(x: Tensor) -> Tensor:
    """x (.., N) with rows at even distances."""
    steps = x.dim() < 3 or len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if x.stride(-1) == 1 and steps else x.contiguous()


def optimize_for_cpu(model: Decoder) -> None:
    """In place. Does nothing but on CPUs, and nothing twice."""
    if model.device.type != "cpu":
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, streamed(child))
    for module in model.modules():
        if isinstance(module, Attention):
            optimize_attention(module)
        elif isinstance(module, Mlp):
            put(module, "inner", Inner)
        elif isinstance(module, Norm):
            put(module, "forward", Normed)
    for block in model.blocks:
        assert isinstance(block, Block)
        optimize_block(block)


def optimize_block(block: Block) -> None:
    found = curve(block.mlp) if isinstance(block.mlp, Mlp) else None
    if found is not None and block.residual == "pre" and block.attn_gate is None:
        put(block, "forward", lambda block: Rest(block, found))


def optimize_attention(attn: Attention) -> None:
    a = attn.spec
    if not a.cross and alike(attn.wq, attn.wk, attn.wv):
        put(attn, "project", Project)
    if a.rope and not a.rope.interleaved:
        put(attn, "turn", Turn)
    if not a.cross and a.softcap is None and attn.sinks is None and a.head_dim % 32 == 0:
        put(attn, "read", Read)


def put(module: nn.Module, name: str, ctx: Callable[[Any], object]) -> None:
    """Have a step of a module done otherwise."""
    if name not in vars(module):
        setattr(module, name, ctx(module))


@contextmanager
def disable_fusion(root: nn.Module) -> Iterator[None]:
    """Inside, every linear layer is called for its own product of many rows: for those who look at what it is given."""
    joint = [(m, name, vars(m).pop(name)) for m in root.modules() for name in ("project", "inner") if name in vars(m)]
    try:
        yield
    finally:
        for module, name, ctx in joint:
            setattr(module, name, ctx)


def streamed(linear: nn.Linear) -> SkinnyGemmLinear:
    """The same layer, with the same parameters."""
    with torch.device("meta"):
        new = SkinnyGemmLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    new.weight, new.bias = linear.weight, linear.bias
    return new


def alike(*layers: nn.Module) -> bool:
    """Whether one operator can do them all: of one kind that has one, all with a bias or none."""
    kinds = {
        (type(x), x.bits if isinstance(x, QuantizedLinear) else 0, getattr(x, "bias", None) is None) for x in layers
    }
    return len(kinds) == 1 and isinstance(layers[0], QuantizedLinear | SkinnyGemmLinear)
