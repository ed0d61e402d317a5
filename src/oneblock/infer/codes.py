"""Weights in 8 and 4 bits: how numbers become codes, and how codes lie in memory.

8 bits: w = scale * (code - 128), a scale (fp32) for each row. 4 bits: w = scale * code + offset, both fp16 and one for
each group of a row. Shapes: N rows (out), K columns (in), G columns in a group. Rows lie in tiles of 16, as the
kernels read them: codes (N / 16, K / 4 or K / 8, 16, 4) bytes, scales and offsets (N / 16, K / G, 16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16


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


def in_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floats of 8 bits (N, K) and scales (N, 1): the largest number of a row is the largest there is, 448."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn), scale


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
