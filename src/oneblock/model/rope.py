"""RoPE with every scaling method of the supported models, and sinusoidal position embeddings.

Shapes: B batch, T tokens, R rotated dimensions of a head (all of them, or `Rope.dim`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oneblock import spec as s


def rotary_table(rope: s.Rope, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at each position, fp32: (B, T) -> two of (B, T, R / 2).

    Scalings that depend on the sequence length (dynamic NTK, LongRoPE) use each row's own length, so that a row gets
    the same angles in any batch.
    """
    freqs, gain = frequencies(rope, head_dim, positions)
    angles = positions[..., None].float() * freqs
    return angles.cos() * gain, angles.sin() * gain


def frequencies(rope: s.Rope, head_dim: int, positions: Tensor) -> tuple[Tensor, float]:
    """Radians per position, (R / 2,) or (B, 1, R / 2) where rows differ, and the factor of cos and sin."""
    dim = rope.dim or head_dim
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    freqs = 1.0 / rope.theta**exponent
    match rope.scaling:
        case None:
            return freqs, 1.0
        case s.LinearScaling(factor):
            return freqs / factor, 1.0
        case s.DynamicNTK(factor, context):
            growth = factor * _length(positions).clamp(min=context) / context - (factor - 1)
            return 1.0 / (rope.theta * growth ** (dim / (dim - 2))) ** exponent, 1.0
        case s.Llama3Scaling(factor, low, high, context):
            return llama3(freqs, factor, low, high, context), 1.0
        case s.Yarn() as yarn:
            keep = 1 - yarn_ramp(yarn, rope.theta, dim, positions.device)
            return freqs / yarn.factor * (1 - keep) + freqs * keep, yarn.attention_factor
        case s.LongRope(short, long, context, gain):
            near, far = (torch.tensor(x, device=positions.device, dtype=torch.float32) for x in (short, long))
            return freqs / torch.where(_length(positions) > context, far, near), gain


def _length(positions: Tensor) -> Tensor:
    """Each row's sequence length so far: (B, T) -> (B, 1, 1), fp32."""
    return positions.amax(-1)[:, None, None].float() + 1


def llama3(freqs: Tensor, factor: float, low: float, high: float, context: int) -> Tensor:
    """Keep frequencies with over `high` turns in the original context, divide those under `low` turns by `factor`."""
    turns = context * freqs / (2 * math.pi)
    if low == high:  # Llama 4 Scout: a step, no ramp
        return torch.where(turns < low, freqs / factor, freqs)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freqs / factor + keep * freqs


def yarn_ramp(yarn: s.Yarn, theta: float, dim: int, device: torch.device) -> Tensor:
    """0 above `beta_fast` turns in the original context, 1 below `beta_slow`, a ramp between: (R / 2,)."""

    def dimension_with(turns: float) -> float:
        return dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_with(yarn.beta_fast), dimension_with(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # avoids a division by zero, as the paper's code does
    return ((torch.arange(dim // 2, device=device, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R dimensions of each head: x (.., D), cos and sin (.., R / 2), broadcast over heads."""
    dim = 2 * cos.shape[-1]
    x, unrotated = (x, None) if dim == x.shape[-1] else (x[..., :dim], x[..., dim:])
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        a, b = torch.stack((a, b), -1).flatten(-2), None
    return torch.cat([part for part in (a, b, unrotated) if part is not None], -1)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """The fixed embeddings of arXiv:1706.03762, section 3.5: (B, T) -> (B, T, dim), fp32."""
    freqs = 10_000.0 ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[..., None].float() * freqs
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :dim]
