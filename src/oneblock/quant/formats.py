"""Weight formats int8, int4 and fp8: how numbers are rounded, and how the results lie in memory.

int8  w = scale * (q - 128), with an fp32 scale per row.
int4  w = group_scale * (q - zero_point) per group of a row, where group_scale = scale * group_qscale and zero_point =
      (qzero - 128) / 8, with group_qscale and qzero in 8 bits: quantized scales as in QLoRA (arXiv:2305.14314) and
      llama.cpp's K-quants.
fp8   w = scale * q, with q in float8_e4m3fn and an fp32 scale per row.

Shapes: N rows (out_features), K columns (in_features), G columns per group. int8 and int4 rows lie in tiles of 16, as
the kernels read them: qweight (N / 16, K / 4 or K / 8, 16, 4) bytes, group_params (N / 16, K / G, 2, 16), scale
(N / 16, 16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16
CHUNK = 1 << 24  # weights that are quantized at a time: each needs several fp32 temporaries


def pack_tiles(q: Tensor, bits: int) -> Tensor:
    """(N, K) bytes to tiles of 16 rows, zero-padded."""
    q = F.pad(q, (0, 0, 0, -len(q) % TILE))
    columns = q.shape[1]
    if bits == 8:
        return q.view(-1, TILE, columns // 4, 4).transpose(1, 2)
    nibbles = q.view(-1, TILE, columns // 8, 2, 4)
    return (nibbles[:, :, :, 0] | (nibbles[:, :, :, 1] << 4)).transpose(1, 2)


def unpack_rows(rows: Tensor, bits: int) -> Tensor:
    """Rows of tiles, (n, K / 4 or K / 8, 4), to (n, K)."""
    if bits == 8:
        return rows.flatten(1)
    return torch.stack((rows & 15, rows >> 4), 2).flatten(1)


def tile_rows(rows: Tensor) -> Tensor:
    """(N, ..) to tiles (N / 16, .., 16), zero-padded."""
    padding = rows.new_zeros(-len(rows) % TILE, *rows.shape[1:])
    return torch.cat((rows, padding)).unflatten(0, (-1, TILE)).movedim(1, -1)


# ------------------------------------------------------------------ rounding


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, K) and scale (N, 1): the largest magnitude of a row becomes 127."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() + 128, scale


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, K) in float8_e4m3fn and scale (N, 1): the largest magnitude of a row becomes the format's largest, 448."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn), scale


@dataclass(frozen=True)
class QuantParams:
    """int4 parameters: scale (N, 1); group_qscale and qzero (N, groups), 8-bit integers held as floats."""

    scale: Tensor
    group_qscale: Tensor
    qzero: Tensor

    @property
    def group_scale(self) -> Tensor:
        """The difference between adjacent quantized values, (N, groups)."""
        return self.scale * self.group_qscale

    @property
    def zero_point(self) -> Tensor:
        """The quantized value of 0.0, not an integer, (N, groups)."""
        return (self.qzero - 128) / 8

    def quantize(self, weight: Tensor) -> Tensor:
        """Round weights (N, groups, G) to 0 .. 15."""
        return (weight / self.group_scale[..., None] + self.zero_point[..., None]).round().clamp(0, 15)

    def dequantize(self, q: Tensor) -> Tensor:
        """(N, groups, G) of 0 .. 15 as weights."""
        return (q - self.zero_point[..., None]) * self.group_scale[..., None]


def row_scales(weight: Tensor, group: int, headroom: float = 1.0) -> Tensor:
    """int4 scales (N, 1): the widest group of a row gets the largest group_qscale, divided by `headroom`."""
    groups = weight.float().unflatten(1, (-1, group))
    widest = ideal_group_scale(groups.amin(-1), groups.amax(-1)).amax(1, keepdim=True)
    return widest.clamp(min=1e-30) * headroom / 255


def ideal_group_scale(low: Tensor, high: Tensor) -> Tensor:
    """The scale with which 16 values span low .. high and the zero point fits into its 8 bits."""
    return torch.maximum((high - low) / 15, low.abs() / 15.875)


def params_for_range(scale: Tensor, low: Tensor, high: Tensor) -> QuantParams:
    """Parameters of groups whose weights lie between low and high, (N, groups)."""
    group_qscale = (ideal_group_scale(low, high) / scale).round().clamp(1, 255)
    qzero = 128 - (8 * low / (scale * group_qscale)).round()
    return QuantParams(scale, group_qscale, qzero.clamp(0, 255))


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, QuantParams]:
    """q (N, K) and its parameters, computed in chunks of rows."""
    q, params = [], []
    for rows in weight.split(max(CHUNK // weight.shape[1], 1)):
        groups = rows.float().unflatten(1, (-1, group))
        params.append(fit_quant_params(groups, row_scales(rows, group)))
        q.append(params[-1].quantize(groups).flatten(1).to(torch.uint8))
    fields = zip(*((p.scale, p.group_qscale, p.qzero) for p in params), strict=True)
    return torch.cat(q), QuantParams(*map(torch.cat, fields))


def fit_quant_params(groups: Tensor, scale: Tensor, importance: Tensor | float = 1.0) -> QuantParams:
    """Choose, for groups (N, groups, G) of rows with these scales (N, 1), the best of ten ranges by squared error.

    `importance` (G,) weights the columns, by the size of their activations.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    candidates = [params_for_range(scale, low * f, high * f) for f in torch.linspace(1.0, 0.64, 10).tolist()]
    errors = [((p.dequantize(p.quantize(groups)) - groups).square() * importance).sum(-1) for p in candidates]
    best = torch.stack(errors).argmin(0, keepdim=True)
    fields = (torch.stack([getattr(p, name) for p in candidates]) for name in ("group_qscale", "qzero"))
    return QuantParams(scale, *(x.gather(0, best)[0] for x in fields))
