"""A finished model made ready to decode on a CPU: products that stream weights, several matrices in one product.

Done from outside and in place; parameters and their names stay. Without kernels torch's products stand in.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from oneblock.infer.kernels.build import available
from oneblock.infer.linears import Coded, Layer, Streamed, product
from oneblock.model import Decoder
from oneblock.model.attention import Attention
from oneblock.model.mlp import Mlp
from oneblock.model.step import Step


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


class Widen:
    """`Mlp.widen` as one product."""

    def __init__(self, mlp: Mlp):
        self.mlp = mlp

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mlp = cast(Any, self.mlp)
        up, gate = product(x, (mlp.up, mlp.gate))
        return up, gate


class Read:
    """`Attention.read` for one query: each key is read once for all heads that share it."""

    def __init__(self, attn: Attention):
        self.attn, self.read = attn, attn.read
        self.scale = attn.spec.scale or attn.spec.head_dim**-0.5

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, step: Step, layer: int) -> Tensor:
        fits = q.shape[2] == 1 and q.dtype == k.dtype == torch.bfloat16 and q.device.type == "cpu"
        if not fits or step.documents is not None or not available():
            return self.read(q, k, v, step, layer)
        keys = k.shape[2]
        seen = step.mask(self.attn.spec, layer, slice(0, 1), slice(0, keys))[:, 0, 0]
        return torch.ops.oneblock_rows.attend(q.contiguous(), k, v, seen.contiguous(), self.scale)


def streamline(model: Decoder) -> None:
    """In place. Does nothing but on CPUs, and nothing twice."""
    if model.device.type != "cpu":
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, streamed(child))
    for module in model.modules():
        if isinstance(module, Attention) and "project" not in vars(module):
            join_attention(module)
        if isinstance(module, Mlp) and module.gate is not None and alike(module.up, module.gate):
            module.widen = Widen(module)


def join_attention(attn: Attention) -> None:
    a = attn.spec
    if not a.cross and alike(attn.wq, attn.wk, attn.wv):
        attn.project = Project(attn)
    if not a.cross and a.softcap is None and attn.sinks is None and a.head_dim % 32 == 0:
        attn.read = Read(attn)


def streamed(linear: nn.Linear) -> Streamed:
    """The same layer, with the same parameters."""
    with torch.device("meta"):
        new = Streamed(linear.in_features, linear.out_features, bias=linear.bias is not None)
    new.weight, new.bias = linear.weight, linear.bias
    return new


def alike(*layers: nn.Module) -> bool:
    """Whether one product can do them all: of one kind, all with a bias or none."""
    kinds = {(type(x), x.bits if isinstance(x, Coded) else 0, getattr(x, "bias", None) is None) for x in layers}
    return len(kinds) == 1 and isinstance(layers[0], Layer)
