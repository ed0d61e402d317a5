"""A finished model made fast on a CPU: its modules are replaced by fused ones with the same parameters and names.

Skinny GEMM, q, k and v in one GEMM, gate and up in one GEMM, one operator for a norm, an activation or RoPE, and in a
decode step one operator for everything after attention. Without kernels, or where gradients are needed, each fused
module does what the one it replaced does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from oneblock import spec as s
from oneblock.kernels.build import can_use_kernels, use_kernel
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.kernels.linear import MAX_ROWS, SkinnyGemmLinear, fused_linear, is_unmodified, kernel_args
from oneblock.kernels.substitution import as_subclass, replace_module
from oneblock.model import Decoder
from oneblock.model.attention import Attention
from oneblock.model.context import ForwardContext
from oneblock.model.decoder import Block
from oneblock.model.mlp import Mlp, activate
from oneblock.model.norm import Norm

GELU = 2 * (2 / math.pi) ** 0.5
# Activations that are x * sigmoid(a x + b x^3): (a, b)
SIGMOID_COEFFICIENTS = {"silu": (1.0, 0.0), "quick_gelu": (1.702, 0.0), "gelu_tanh": (GELU, GELU * 0.044715)}


def sigmoid_coefficients(spec: s.Mlp) -> tuple[float, float] | None:
    """(a, b) of an activation that our operators compute; None for the others."""
    return SIGMOID_COEFFICIENTS.get(spec.act) if spec.clamp is None and not spec.up_offset else None


class FusedAttention(Attention):
    """Attention with one GEMM for q, k and v and one operator for RoPE."""

    def project_qkv(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x is not source:  # cross-attention, or the last layer of a prefill, which needs few queries
            return super().project_qkv(x, source)
        q, k, v = fused_linear(x, self.wq, self.wk, self.wv)
        return q, k, v

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope = self.spec.rope
        if not use_kernel(x) or x.stride(-1) != 1 or rope is None or rope.interleaved:
            return super().rotate(x, cos, sin)
        return torch.ops.oneblock_cpu.apply_rope(x, cos.contiguous(), sin.contiguous())


class FusedMlp(Mlp):
    """An MLP with one GEMM for gate and up and one operator for the activation."""

    def hidden_activations(self, x: Tensor) -> Tensor:
        up, gate = (self.up(x), None) if self.gate is None else fused_linear(x, self.up, self.gate)
        h = up if gate is None else gate
        coefficients = sigmoid_coefficients(self.spec)
        if coefficients is None or not use_kernel(h):
            return activate(self.spec, up, gate)
        h = make_rows_contiguous(h)
        torch.ops.oneblock_cpu.gated_activation(h, None if gate is None else make_rows_contiguous(up), *coefficients)
        return h


class FusedNorm(Norm):
    """A norm as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        if not use_kernel(x) or self.weight.dtype != x.dtype:
            return super().forward(x)
        return torch.ops.oneblock_cpu.norm(x.contiguous(), *norm_args(self))


def norm_args(norm: Norm) -> tuple[Tensor, Tensor | None, float, float, bool, bool]:
    """A norm as the operators take it: weight, bias, eps, offset, centred, gain_after."""
    spec, centred = norm.spec, norm.spec.kind == "layer"
    return norm.weight, norm.bias, spec.eps, spec.weight_offset, centred, not centred and not spec.scale_in_fp32


class FusedBlock(Block):
    """A block that in a decode step computes everything after its attention in one kernel."""

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        one_token = x.shape[1] == 1 and x.shape[0] <= MAX_ROWS and can_use_kernels(x)
        args = self.kernel_args_after_attention(x.dtype) if one_token else None
        if args is None:
            return super().forward(x, ctx, layer)
        y = self.attn.attend(self.attn_in(x), ctx, layer)
        return torch.ops.oneblock_cpu.fused_post_attention(x.contiguous(), y.contiguous(), *args)

    def kernel_args_after_attention(self, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """The operator's arguments after x and y; None unless all parts are fused ones without wrappers or hooks."""
        attn, mlp, norm = self.attn, self.mlp, self.mlp_in
        if type(attn) is not FusedAttention or type(mlp) is not FusedMlp or type(norm) is not FusedNorm:
            return None
        coefficients = sigmoid_coefficients(mlp.spec)
        plain = self.residual == "pre" and self.attn_gate is None and is_unmodified(attn, mlp, norm)
        if coefficients is None or not plain or norm.weight.dtype != dtype:
            return None
        gate = mlp.gate
        layers = (attn.wo, mlp.up, mlp.down) if gate is None else (attn.wo, gate, mlp.up, mlp.down)
        args = kernel_args(*layers)
        return None if args is None else (*args, *norm_args(norm), *coefficients)


def make_rows_contiguous(x: Tensor) -> Tensor:
    """x (.., N) with contiguous rows at one constant stride, copied if it has not."""
    constant = x.dim() < 3 or len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if x.stride(-1) == 1 and constant else x.contiguous()


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SkinnyGemmLinear,
    Attention: FusedAttention,
    Mlp: FusedMlp,
    Norm: FusedNorm,
    Block: FusedBlock,
}


def optimize_for_cpu(model: Decoder) -> None:
    """Replace modules by fused ones, in place. Does nothing on other devices, and nothing the second time."""
    if model.device.type != "cpu":
        return
    use_fast_kernels(model, cpu_operators=True)
    for name, module in list(model.named_modules()):
        if type(module) in FUSED:
            replace_module(model, name, as_subclass(module, FUSED[type(module)]))
