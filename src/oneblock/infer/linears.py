"""Linear layers for decoding: weights that stream as they are, or as codes in 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock.infer.codes import TILE, packed, tiled, unpacked
from oneblock.infer.kernels.build import available

BLOCK = 64  # columns whose activations share a scale, where weights have no groups
MOST = 16  # rows up to which bf16 weights stream faster than torch's product, which wins with more


class Streamed(nn.Linear):
    """nn.Linear whose products of few rows go as fast as the memory."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, (self,))[0]

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Coded(nn.Module):
    """A linear layer of codes, in place of nn.Linear. Groups of 0: 8 bits."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, rows: int, columns: int, group: int, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features, self.group = rows, columns, group
        tiles = -(-rows // TILE)
        packed, wide = (columns // 8, torch.float16) if group else (columns // 4, torch.float32)
        sizes = (tiles, columns // group if group else 1, TILE)
        self.register_buffer("codes", torch.empty((tiles, packed, TILE, 4), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(sizes, dtype=wide))
        self.register_buffer("offset", torch.empty(sizes, dtype=wide) if group else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def bits(self) -> int:
        return 4 if self.group else 8

    @property
    def block(self) -> int:
        """Columns that share an activation's scale."""
        return self.group or next(n for n in (BLOCK, 32, 16) if self.in_features % n == 0)

    def fill(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> None:
        """From plain rows: codes (N, K) of whole numbers from 0, scale and offset (N, groups)."""
        self.codes.copy_(packed(codes.to(torch.uint8), self.bits))
        self.scale.copy_(tiled(scale))
        if self.offset is not None and offset is not None:
            self.offset.copy_(tiled(offset))

    def rows(self, index: Tensor | None = None) -> Tensor:
        """The weights in fp32, (N, K), or some of their rows."""
        index = torch.arange(self.out_features, device=self.codes.device) if index is None else index
        tile, lane = index // TILE, index % TILE
        codes = unpacked(self.codes[tile, :, lane], self.bits).float()
        scale = self.scale[tile, :, lane].float()
        if self.offset is None:
            return (codes - 128) * scale
        offset = self.offset[tile, :, lane].float()
        return (codes.unflatten(1, (-1, self.group)) * scale[..., None] + offset[..., None]).flatten(1)

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


Layer = Streamed | Coded


def product(x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
    """What each layer makes of x (.., K)."""
    kernels = x.device.type == "cpu" and x.dtype == torch.bfloat16 and available()
    coded = [layer for layer in layers if isinstance(layer, Coded)]
    few = x.numel() <= MOST * x.shape[-1]
    if not kernels or not (few or coded) or len(coded) not in (0, len(layers)):
        return [layer.plain(x) for layer in layers]
    x, shape = x.contiguous(), x.shape[:-1]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    sizes = [layer.out_features for layer in layers]
    if coded:
        offsets = [layer.offset for layer in coded if layer.offset is not None]
        codes, scales = [layer.codes for layer in coded], [layer.scale for layer in coded]
        y = torch.ops.oneblock_rows.linear_coded(x, codes, scales, offsets, biases, sizes, coded[0].block)
    else:
        y = torch.ops.oneblock_rows.linear(x, [cast(Streamed, layer).weight for layer in layers], biases)
    return y.view(*shape, -1).split(sizes, -1) if len(sizes) > 1 else (y.view(*shape, -1),)
