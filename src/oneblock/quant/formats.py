"""Weights in 8 and 4 bits: how numbers become codes, and how codes lie in memory.

8 bits: w = scale * (code - 128), a scale (fp32) for each row. 4 bits: w = scale * factor * (code - (zero - 128) / 8),
where each group of a row has a factor and a zero, 8 bits each: scales of scales, as in QLoRA (arXiv:2305.14314) and
llama.cpp's K-quants. Shapes: N rows (out), K columns (in), G columns in a group. Rows lie in tiles of 16, as the
kernels read them: codes (N / 16, K / 4 or K / 8, 16, 4) bytes, groups (N / 16, K / G, 2, 16), scales (N / 16, 16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16
PART = 1 << 24  # weights in fp32 at a time, with a few numbers made of each


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


def tiled(rows: Tensor) -> Tensor:
    """(N, ..) to tiles (N / 16, .., 16); missing rows are zeros."""
    more = rows.new_zeros(-len(rows) % TILE, *rows.shape[1:])
    return torch.cat((rows, more)).unflatten(0, (-1, TILE)).movedim(1, -1)


# ------------------------------------------------------------------ which codes


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales (N, 1): the largest number of a row is 127 away from zero."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() + 128, scale


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floats of 8 bits (N, K) and scales (N, 1): the largest number of a row is the largest there is, 448."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn), scale


@dataclass(frozen=True)
class QuantParams:
    """What 4-bit codes stand for: scale (N, 1), and factor and zero (N, groups), whole numbers of 8 bits, as floats."""

    scale: Tensor
    factor: Tensor
    zero: Tensor

    @property
    def step(self) -> Tensor:
        """From one code to the next, (N, groups)."""
        return self.scale * self.factor

    @property
    def lowest(self) -> Tensor:
        """The number of code 0, in steps, (N, groups)."""
        return (128 - self.zero) / 8

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest ones of weights (N, groups, G)."""
        return (weight / self.step[..., None] - self.lowest[..., None]).round().clamp(0, 15)

    def numbers(self, codes: Tensor) -> Tensor:
        """(N, groups, G) as numbers again."""
        return (codes + self.lowest[..., None]) * self.step[..., None]


def scale_of(weight: Tensor, group: int, room: float = 1.0) -> Tensor:
    """Scales (N, 1) of rows in 4 bits: the widest group's factor is the largest, with `room` for wider ones to come."""
    groups = weight.float().unflatten(1, (-1, group))
    widest = steps(groups.amin(-1), groups.amax(-1)).amax(1, keepdim=True)
    return widest.clamp(min=1e-30) * room / 255


def steps(low: Tensor, high: Tensor) -> Tensor:
    """From code to code, so that 16 codes span the range and zero is near enough for its 8 bits."""
    return torch.maximum((high - low) / 15, low.abs() / 15.875)


def ranges(scale: Tensor, low: Tensor, high: Tensor) -> QuantParams:
    """Of groups that lie between low and high, (N, groups)."""
    factor = (steps(low, high) / scale).round().clamp(1, 255)
    zero = 128 - (8 * low / (scale * factor)).round()
    return QuantParams(scale, factor, zero.clamp(0, 255))


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, QuantParams]:
    """Codes (N, K) and what they stand for, part by part."""
    codes, found = [], []
    step = max(PART // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        groups = rows.float().unflatten(1, (-1, group))
        found.append(fit_quant_params(groups, scale_of(rows, group)))
        codes.append(found[-1].codes(groups).flatten(1).to(torch.uint8))
    whole = zip(*((r.scale, r.factor, r.zero) for r in found), strict=True)
    return torch.cat(codes), QuantParams(*map(torch.cat, whole))


def fit_quant_params(groups: Tensor, scale: Tensor, importance: Tensor | float = 1.0) -> QuantParams:
    """Of groups (N, groups, G) of rows with these scales (N, 1): of ten tried, those with the least squared error.

    `importance` (G,) weighs the columns: how large their activations are.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    tried = [ranges(scale, low * shrink, high * shrink) for shrink in torch.linspace(1.0, 0.64, 10).tolist()]
    wrong = torch.stack([((r.numbers(r.codes(groups)) - groups).square() * importance).sum(-1) for r in tried])
    best = wrong.argmin(0, keepdim=True)
    factor, zero = (torch.stack([getattr(r, name) for r in tried]).gather(0, best)[0] for name in ("factor", "zero"))
    return QuantParams(scale, factor, zero)
