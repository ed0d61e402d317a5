"""Our C++ products and attention against torch's, and the model that uses them against the one that does not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from oneblock.infer.cache import KVCache
from oneblock.infer.codes import in_4_bits, in_8_bits
from oneblock.infer.kernels import build
from oneblock.infer.linears import Coded, Streamed, product
from oneblock.infer.streamline import streamed, streamline
from oneblock.model import Decoder, init_weights
from oneblock.spec import spec

kernels = pytest.mark.skipif(not build.available(), reason=build.missing() or "there are kernels")
ROWS = (1, 2, 3, 4, 5, 8, 9, 16)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Rows are shared out."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def wrong(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error's share of what was expected."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 8), (48, 5), (100, 17), (768, 300), (2048, 64)])
def test_products_of_several_matrices(rows: int, n_in: int, n_out: int) -> None:
    torch.manual_seed(0)
    layers = [streamed(torch.nn.Linear(n_in, n, dtype=torch.bfloat16)) for n in (n_out, 3, n_out)]
    x = torch.randn(1, rows, n_in).bfloat16()
    with torch.no_grad():
        for y, layer in zip(product(x, layers), layers, strict=True):
            assert layer.bias is not None
            expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
            assert y.shape == expected.shape
            assert wrong(y, expected) < 0.004  # a bf16 rounding of each


@kernels
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 15, 40])
@pytest.mark.parametrize(
    ("n_in", "n_out", "group"), [(64, 5, 0), (96, 40, 32), (768, 33, 128), (48, 16, 0), (256, 7, 64)]
)
def test_products_of_codes(rows: int, n_in: int, n_out: int, group: int) -> None:
    torch.manual_seed(0)
    layer = Coded(n_out, n_in, group, torch.randn(n_out).bfloat16())
    weight = torch.randn(n_out, n_in)
    layer.fill(*(in_4_bits(weight, group) if group else (*in_8_bits(weight), None)))
    x = torch.randn(rows, n_in).bfloat16()
    assert layer.bias is not None
    expected = F.linear(x.float(), layer.rows(), layer.bias.float())
    with torch.no_grad():
        assert wrong(layer(x), expected) < (0.012 if group else 0.004)  # 4 bits take activations in 8
    assert wrong(layer.plain(x), expected) < 0.01


@kernels
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "keys"), [(4, 4, 32, 1), (8, 2, 64, 100), (6, 1, 128, 33)])
def test_attention_of_one_query(heads: int, kv_heads: int, dim: int, keys: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, heads, 1, dim).bfloat16()
    k, v = (torch.randn(3, kv_heads, keys + 20, dim).bfloat16()[:, :, :keys] for _ in range(2))
    seen = torch.rand(3, keys) > 0.3
    seen[:, 0] = True
    k.masked_fill_(~seen[:, None, :, None], 99.0)  # what is not seen does not matter
    found = torch.ops.oneblock_rows.attend(q, k, v, seen, 0.2)
    expected = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), seen[:, None, None], scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.01)


def small(family: str, **more: int) -> Decoder:
    sizes = {"vocab": 96, "dim": 64, "n_layers": 2, "n_heads": 2, "context": 64, **more}
    model = Decoder(spec(family, **sizes))
    init_weights(model, 0)
    return model


@kernels
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_model_says_the_same_with_them(family: str) -> None:
    model = small(family).bfloat16().eval()
    names = [name for name, _ in model.named_parameters()]
    ids = torch.randint(96, (3, 9))

    @torch.no_grad()
    def said() -> torch.Tensor:
        cache = KVCache(model.spec, 3, 16, torch.bfloat16)
        return torch.cat(
            [model(ids[:, :6], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in (6, 7, 8)], 1
        )

    before = said()
    streamline(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert any(isinstance(m, Streamed) for m in model.modules())
    assert wrong(said(), before.float()) < 0.02
    loss = model(ids).float().logsumexp(-1).sum()  # and learns as before
    loss.backward()
    assert all(p.grad is not None for p in model.blocks[0].attn.parameters())


def test_where_there_is_no_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ONEBLOCK_KERNELS", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for found in (build.missing, build.cached):
        monkeypatch.setattr(build, found.__name__, found.__wrapped__)
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset(build.NEEDED))
    assert build.missing() == "there is no C++ compiler (no-such-compiler)"
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset())
    assert build.missing() == "this processor has no avx512f"
    monkeypatch.setenv("ONEBLOCK_KERNELS", "0")
    assert build.missing() == "ONEBLOCK_KERNELS is 0"


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **rest: object) -> None:
        raise subprocess.CalledProcessError(1, "g++", stderr=b"error: too old\nmore")

    monkeypatch.delenv("ONEBLOCK_KERNELS", raising=False)
    monkeypatch.setattr(build, "cached", lambda: tmp_path / "none.so")
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset(build.NEEDED))
    monkeypatch.setattr(subprocess, "run", fail)
    assert build.missing.__wrapped__().endswith("failed: error: too old")
