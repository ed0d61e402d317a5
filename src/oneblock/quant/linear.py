"""Linear layers for decoding: weights that stream as they are, or as codes in 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock.kernels.build import fits
from oneblock.quant.formats import TILE, QuantParams, packed, quantize_float8, tiled, unpacked

BLOCKS = (256, 128, 64, 32, 16)  # columns whose activations share a scale, where weights have no groups: what divides
MOST = 16  # rows up to which bf16 weights stream faster than torch's product, which wins with more


class SkinnyGemmLinear(nn.Linear):
    """nn.Linear whose products of few rows go as fast as the memory."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, (self,))[0]

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """A linear layer of codes, in place of nn.Linear. Groups of 0 columns: 8 bits."""

    codes: Tensor
    scale: Tensor
    groups: Tensor | None  # factor and zero of each

    def __init__(self, rows: int, columns: int, group: int, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features, self.group = rows, columns, group
        tiles = -(-rows // TILE)
        self.register_buffer("codes", torch.empty((tiles, columns * self.bits // 32, TILE, 4), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty((tiles, TILE), dtype=torch.float32))
        ranges = torch.empty((tiles, columns // group, 2, TILE), dtype=torch.uint8) if group else None
        self.register_buffer("groups", ranges)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def bits(self) -> int:
        return 4 if self.group else 8

    @property
    def block(self) -> int:
        """Columns that share an activation's scale."""
        return self.group or next(n for n in BLOCKS if self.in_features % n == 0)

    def fill(self, codes: Tensor, found: Tensor | QuantParams) -> None:
        """From plain rows: codes (N, K) of whole numbers from 0, and scales (N, 1) or, of 4 bits, ranges."""
        self.codes.copy_(packed(codes.to(torch.uint8), self.bits))
        assert (self.groups is None) == isinstance(found, Tensor), "4 bits have ranges, 8 bits scales"
        if self.groups is not None and isinstance(found, QuantParams):
            self.groups.copy_(tiled(torch.stack((found.factor, found.zero), -1)))
        self.scale.copy_(tiled((found.scale if isinstance(found, QuantParams) else found)[:, 0]))

    def rows(self, index: Tensor | None = None) -> Tensor:
        """The weights in fp32, (N, K), or some of their rows."""
        index = torch.arange(self.out_features, device=self.codes.device) if index is None else index
        tile, lane = index // TILE, index % TILE
        codes = unpacked(self.codes[tile, :, lane], self.bits).float()
        scale = self.scale[tile, lane][:, None]
        if self.groups is None:
            return (codes - 128) * scale
        found = QuantParams(scale, *self.groups[tile, :, :, lane].float().unbind(-1))
        return found.numbers(codes.unflatten(1, (-1, self.group))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, (self,))[0]

    def plain(self, x: Tensor) -> Tensor:
        """The product by weights made whole again, part by part."""
        step = max(TILE, (1 << 22) // self.in_features // TILE * TILE)
        parts = []
        for start in range(0, self.out_features, step):
            index = torch.arange(start, min(start + step, self.out_features), device=x.device)
            bias = None if self.bias is None else self.bias[index].type_as(x)
            parts.append(F.linear(x, self.rows(index).type_as(x), bias))
        return torch.cat(parts, -1)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, group {self.group or self.in_features}"


class Float8Linear(nn.Module):
    """A linear layer of 8-bit floats with a scale for each row (arXiv:2209.05433); new GPUs multiply such floats."""

    codes: Tensor  # (N, K), float8_e4m3fn
    scale: Tensor  # (N, 1), fp32
    bits = 8

    def __init__(self, rows: int, columns: int, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.register_buffer("codes", torch.empty((rows, columns), dtype=torch.float8_e4m3fn))
        self.register_buffer("scale", torch.empty((rows, 1), dtype=torch.float32))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def rows(self, index: Tensor | None = None) -> Tensor:
        """The weights in fp32, (N, K), or some of their rows."""
        codes, scale = (
            x if index is None else x.view(torch.uint8)[index].view(x.dtype) for x in (self.codes, self.scale)
        )
        return codes.float() * scale

    def forward(self, x: Tensor) -> Tensor:
        even = self.in_features % 16 == self.out_features % 16 == 0  # as the hardware wants them
        return self.direct(x) if even and floats_multiply(x) else self.plain(x)

    def direct(self, x: Tensor) -> Tensor:
        """Activations in 8-bit floats too, with a scale for each token."""
        codes, scale = quantize_float8(x.flatten(0, -2))
        by_row = F.ScalingType.RowWise
        y = F.scaled_mm(codes, self.codes.t(), scale, by_row, self.scale.t(), by_row, output_dtype=x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.type_as(y)

    def plain(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.linear(x, self.rows().type_as(x), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, 8-bit floats"


def floats_multiply(x: Tensor) -> bool:
    """Whether the device has products of 8-bit floats: GPUs since Ada and Hopper."""
    return (
        x.device.type == "cuda" and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 9)
    )


Layer = SkinnyGemmLinear | QuantizedLinear | Float8Linear


def product(x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
    """What each layer makes of x (.., K): all in one of our products where they are of one kind that has one."""
    streamed = [layer for layer in layers if isinstance(layer, SkinnyGemmLinear)]
    coded = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if not fits(x):
        return [layer.plain(x) for layer in layers]
    if len(coded) < len(layers) and (len(streamed) < len(layers) or x.numel() > MOST * x.shape[-1]):
        return [layer.plain(x) for layer in layers]
    y = torch.ops.oneblock_rows.linear(x.contiguous(), *held(coded or streamed)).view(*x.shape[:-1], -1)
    return y.split([layer.out_features for layer in layers], -1) if len(layers) > 1 else (y,)


def held(layers: Sequence[QuantizedLinear | SkinnyGemmLinear]) -> tuple[list[Any], ...]:
    """Layers of one kind as our operators take them: weights or codes, scales, groups, biases, rows, blocks."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    rows = [layer.out_features for layer in layers]
    coded = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if not coded:
        return [layer.weight for layer in layers], [], [], biases, rows, []
    groups = [layer.groups for layer in coded if layer.groups is not None]
    codes, scales = [layer.codes for layer in coded], [layer.scale for layer in coded]
    return codes, scales, groups, biases, rows, [layer.block for layer in coded]
