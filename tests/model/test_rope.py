"""RoPE frequencies against transformers, and the sinusoidal embeddings of the first Transformer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from oneblock.model.rope import apply_rope, frequencies, rotary_table, sinusoids
from oneblock.spec import DynamicNTK, LinearScaling, Llama3Scaling, LongRope, Rope, Yarn

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SHORT, LONG = (tuple(1 + 0.1 * i for i in range(16)), tuple(2 + 0.3 * i for i in range(16)))
GAIN = math.sqrt(1 + math.log(4) / math.log(64))
CASES: list[tuple[str, Any, dict[str, Any], int]] = [
    ("linear", LinearScaling(4.0), {"factor": 4.0}, 300),
    ("dynamic", DynamicNTK(4.0, 256), {"factor": 4.0}, 300),
    ("dynamic", DynamicNTK(4.0, 256), {"factor": 4.0}, 100),
    (
        "llama3",
        Llama3Scaling(8.0, 1.0, 4.0, 64),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        300,
    ),
    (
        "yarn",
        Yarn(4.0, 64, attention_factor=0.1 * math.log(4) + 1),
        {"factor": 4.0, "original_max_position_embeddings": 64},
        300,
    ),
    (
        "yarn",
        Yarn(4.0, 64, beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=0.1 * math.log(4) + 1),
        {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        300,
    ),
    (
        "longrope",
        LongRope(SHORT, LONG, 64, GAIN),
        {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 64},
        64,
    ),
    (
        "longrope",
        LongRope(SHORT, LONG, 64, GAIN),
        {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 64},
        65,
    ),
]


@pytest.mark.parametrize(
    ("kind", "scaling", "values", "length"), CASES, ids=[f"{c[0]}-{c[3]}-{i}" for i, c in enumerate(CASES)]
)
def test_frequencies_equal_transformers(kind: str, scaling: Any, values: dict[str, Any], length: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **values},
    )
    expected, gain = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    freqs, our_gain = frequencies(Rope(5000.0, scaling=scaling), 32, torch.arange(length)[None])
    torch.testing.assert_close(freqs.squeeze(), expected, atol=0, rtol=1e-6)
    assert our_gain == pytest.approx(gain)


def test_llama3_with_a_step_instead_of_a_ramp() -> None:
    freqs, _ = frequencies(Rope(scaling=Llama3Scaling(16.0, 1.0, 1.0, 64)), 32, torch.arange(4)[None])
    plain, _ = frequencies(Rope(), 32, torch.arange(4)[None])
    turns = 64 * plain / (2 * math.pi)
    torch.testing.assert_close(freqs, torch.where(turns < 1, plain / 16, plain))
    assert freqs.isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 8])
def test_rope_rotates_pairs_and_keeps_other_dimensions(interleaved: bool, dim: int | None) -> None:
    """q @ k depends only on their distance, norms stay, and dimensions beyond R stay."""
    rope = Rope(dim=dim, interleaved=interleaved)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        cos, sin = rotary_table(rope, 16, torch.tensor([[position]]))
        return apply_rope(x, cos[:, None], sin[:, None], interleaved)

    near, far = (turned(q, 5 + n) * turned(k, 3 + n) for n in (0, 1000))
    torch.testing.assert_close(near.sum(), far.sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned(q, 77).norm(), q.norm())
    assert torch.equal(turned(q, 77)[..., dim or 16 :], q[..., dim or 16 :])
    first, second = (0, 1) if interleaved else (0, (dim or 16) // 2)
    assert turned(q, 1)[..., first].item() == pytest.approx(
        (q[..., first] * math.cos(1) - q[..., second] * math.sin(1)).item(), abs=1e-6
    )


def test_rows_of_a_batch_scale_by_their_own_length() -> None:
    rope = Rope(scaling=DynamicNTK(4.0, 16))
    together = rotary_table(rope, 16, torch.stack((torch.arange(40), torch.arange(-20, 20))))[0]
    torch.testing.assert_close(together[0], rotary_table(rope, 16, torch.arange(40)[None])[0][0])
    torch.testing.assert_close(together[1, 20:], rotary_table(rope, 16, torch.arange(20)[None])[0][0])


def test_sinusoids() -> None:
    y = sinusoids(torch.tensor([[0, 3]]), 8)[0]
    assert y[0].tolist() == [0, 1] * 4
    expected = [f(3 / 10_000 ** (i / 8)) for i in (0, 2, 4, 6) for f in (math.sin, math.cos)]
    assert y[1].tolist() == pytest.approx(expected, abs=1e-6)
