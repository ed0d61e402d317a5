"""Weights in 8 and 4 bits: how numbers become codes, and the module that holds them.

8 bits: w = scale * (code - 128), a scale (fp32) for each row. 4 bits: w = scale * code + offset, both fp16 and one for
each group of a row. Shapes: N rows (out), K columns (in), G columns in a group. Rows lie in tiles of 16, as the
kernels read them: codes (N / 16, K / 4 or K / 8, 16, 4) bytes, scales and offsets (N / 16, K / G, 16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 16
BLOCK = 64  # columns whose activations share a scale, where weights have no groups


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
        from oneblock.infer.streamline import product

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


def packed(codes: Tensor, bits: int) -> Tensor:
    """(N, K) bytes to tiles of 16 rows; missing rows are zeros."""
    codes = F.pad(codes, (0, 0, 0, -len(codes) % TILE))
    columns = codes.shape[1]
    if bits == 8:
        return codes.view(-1, TILE, columns // 4, 4).transpose(1, 2)
    eights = codes.view(-1, TILE, columns // 8, 2, 4)
    return (eights[:, :, :, 0] | (eights[:, :, :, 1] << 4)).transpose(1, 2)


def unpacked(rows: Tensor, bits: int) -> Tensor:
    """Rows of tiles, (n, K / 4 or K / 8, 4), to codes (n, K)."""
    if bits == 8:
        return rows.flatten(1)
    return torch.stack((rows & 15, rows >> 4), 2).flatten(1)


def tiled(scale: Tensor) -> Tensor:
    """(N, groups) to tiles of 16 rows."""
    scale = F.pad(scale, (0, 0, 0, -len(scale) % TILE))
    return scale.view(-1, TILE, scale.shape[1]).transpose(1, 2)


# ------------------------------------------------------------------ which codes


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales (N, 1): the largest number of a row is 127 away from zero."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() + 128, scale


def in_4_bits(weight: Tensor, group: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K), scales and offsets (N, K / group): of ten ranges tried, the one with the least squared error.

    `importance` (K,) weighs the columns: how large their activations are.
    """
    groups = weight.float().unflatten(1, (-1, group))
    weigh = None if importance is None else importance.float().view(1, -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for shrink in torch.linspace(1.0, 0.64, 10).tolist():
        found = rounded(groups, low * shrink, high * shrink, weigh)
        if best is None:
            best = found
        else:
            better = found[3] < best[3]
            kept = zip(found, best, strict=True)
            best = tuple(torch.where(better[..., None] if a.dim() == 3 else better, a, b) for a, b in kept)  # type: ignore[assignment]
    assert best is not None
    return best[0].flatten(1), best[1], best[2]


def rounded(groups: Tensor, low: Tensor, high: Tensor, weigh: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, offset and squared error of each group for one range."""
    scale = ((high - low) / 15).clamp(min=1e-7).half().float()
    offset = low.half().float()
    codes = ((groups - offset[..., None]) / scale[..., None]).round().clamp(0, 15)
    wrong = (codes * scale[..., None] + offset[..., None] - groups).square()
    error = (wrong if weigh is None else wrong * weigh).sum(-1)
    return codes.to(torch.uint8), scale, offset, error
