"""Quantized linear layers: int8 and int4 (QuantizedLinear) and fp8 (Float8Linear)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.kernels.linear import (
    COLUMNS,
    ROWS,
    KernelWeight,
    forward_with_kernel,
    is_bf16,
    slice_bias,
    uses_gemm_kernel,
)
from oneblock.quant.formats import TILE, QuantParams, pack_tiles, quantize_float8, tile_rows, unpack_rows

ACTIVATION_GROUPS = (256, 128, 64, 32, 16)  # columns of int8 layers whose activations share a scale: the first divisor
DEQUANTIZED = 1 << 22  # weights dequantized at a time for torch's GEMM


@uses_gemm_kernel
class QuantizedLinear(nn.Module):
    """A linear layer in int4 with groups of `group` columns, or in int8 with group 0."""

    max_rows: ClassVar[float] = math.inf
    qweight: Tensor
    scale: Tensor
    group_params: Tensor | None  # group_qscale and qzero

    def __init__(self, out_features: int, in_features: int, group: int, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features, self.group = out_features, in_features, group
        tiles = -(-out_features // TILE)
        qweight = torch.empty((tiles, in_features * self.bits // 32, TILE, 4), dtype=torch.uint8)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", torch.empty((tiles, TILE), dtype=torch.float32))
        params = torch.empty((tiles, in_features // group, 2, TILE), dtype=torch.uint8) if group else None
        self.register_buffer("group_params", params)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def bits(self) -> int:
        return 4 if self.group else 8

    def set_weight(self, q: Tensor, params: Tensor | QuantParams) -> None:
        """Store q (N, K) with its scales (N, 1) for int8 or its QuantParams for int4."""
        self.qweight.copy_(pack_tiles(q.to(torch.uint8), self.bits))
        assert (self.group_params is None) == isinstance(params, Tensor), "int4 has QuantParams, int8 has scales"
        if self.group_params is not None and isinstance(params, QuantParams):
            self.group_params.copy_(tile_rows(torch.stack((params.group_qscale, params.qzero), -1)))
        self.scale.copy_(tile_rows((params.scale if isinstance(params, QuantParams) else params)[:, 0]))

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The weights in fp32, (N, K), or some of their rows."""
        rows = torch.arange(self.out_features, device=self.qweight.device) if rows is None else rows
        tile, lane = rows // TILE, rows % TILE
        q = unpack_rows(self.qweight[tile, :, lane], self.bits).float()
        scale = self.scale[tile, lane][:, None]
        if self.group_params is None:
            return (q - 128) * scale
        params = QuantParams(scale, *self.group_params[tile, :, :, lane].float().unbind(-1))
        return params.dequantize(q.unflatten(1, (-1, self.group))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        y = forward_with_kernel(self, x)
        return self.forward_dequantized(x) if y is None else y

    def forward_dequantized(self, x: Tensor) -> Tensor:
        """torch's GEMM on weights dequantized in chunks of rows."""
        step = max(TILE, DEQUANTIZED // self.in_features // TILE * TILE)
        outputs = []
        for rows in torch.arange(self.out_features, device=x.device).split(step):
            bias = None if self.bias is None else self.bias[rows].type_as(x)
            outputs.append(F.linear(x, self.dequantize(rows).type_as(x), bias))
        return torch.cat(outputs, -1)

    def kernel_weight(self) -> KernelWeight | None:
        bias = self.bias
        if bias is not None and not is_bf16(bias):
            return None
        size = self.group or next(n for n in ACTIVATION_GROUPS if self.in_features % n == 0)
        return ((self.group, bias is None), self.qweight, self.scale, self.group_params, bias, self.out_features, size)

    def slice(self, dim: int, part: slice) -> QuantizedLinear:
        """Whole tiles of rows, or whole groups of columns."""
        size = part.stop - part.start
        unit, name, kind = (TILE, "output", "tile") if dim == ROWS else (self.group or TILE, "input", "group")
        if part.start % unit or size % unit:
            raise OneblockError(
                f"a shard of {size} {name} features of an int{self.bits} matrix is not a multiple of its {kind} of "
                f"{unit}; use a smaller tp"
            )

        def take(x: Tensor, columns: int) -> Tensor:
            """A slice of x (tiles, pieces of `columns` columns, ..)."""
            unit = TILE if dim == ROWS else columns
            piece = slice(part.start // unit, part.stop // unit)
            return (x[piece] if dim == ROWS else x[:, piece]).clone()

        sizes = [self.out_features, self.in_features]
        sizes[dim] = size
        with torch.device("meta"):
            new = QuantizedLinear(sizes[0], sizes[1], self.group)
        new.qweight = take(self.qweight, 32 // self.bits)
        new.scale = self.scale.clone() if dim == COLUMNS else take(self.scale, 1)
        new.group_params = None if self.group_params is None else take(self.group_params, self.group)
        new.bias = slice_bias(self.bias, dim, part)
        return new

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int{self.bits}, group {self.group or self.in_features}"


class Float8Linear(nn.Module):
    """A linear layer in fp8 with a scale per row (arXiv:2209.05433), multiplied in fp8 by GPUs since Ada and Hopper."""

    qweight: Tensor  # (N, K), float8_e4m3fn
    scale: Tensor  # (N, 1), fp32
    bits = 8

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("qweight", torch.empty((out_features, in_features), dtype=torch.float8_e4m3fn))
        self.register_buffer("scale", torch.empty((out_features, 1), dtype=torch.float32))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The weights in fp32, (N, K), or some of their rows."""
        q, scale = self.qweight, self.scale
        if rows is not None:
            q, scale = q.view(torch.uint8)[rows].view(q.dtype), scale[rows]
        return q.float() * scale

    def forward(self, x: Tensor) -> Tensor:
        divisible = self.in_features % 16 == self.out_features % 16 == 0  # torch._scaled_mm's condition
        return self.forward_scaled_mm(x) if divisible and has_fp8_gemm(x) else self.forward_dequantized(x)

    def forward_scaled_mm(self, x: Tensor) -> Tensor:
        """fp8 GEMM, activations in fp8 too, with a scale per token."""
        q, scale = quantize_float8(x.flatten(0, -2))
        # not F.scaled_mm, which torch 2.11 cannot trace
        gemm = torch.ops.aten._scaled_mm
        y = gemm(q, self.qweight.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.type_as(y)

    def forward_dequantized(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.linear(x, self.dequantize().type_as(x), bias)

    def slice(self, dim: int, part: slice) -> Float8Linear:
        qweight = self.qweight[part] if dim == ROWS else self.qweight[:, part]
        with torch.device("meta"):
            new = Float8Linear(qweight.shape[0], qweight.shape[1])
        new.qweight = qweight.clone()
        new.scale = (self.scale[part] if dim == ROWS else self.scale).clone()
        new.bias = slice_bias(self.bias, dim, part)
        return new

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, fp8"


def has_fp8_gemm(x: Tensor) -> bool:
    """Whether x's device multiplies fp8: GPUs since Ada and Hopper."""
    return (
        x.device.type == "cuda" and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 9)
    )
