"""The C++ kernels against torch in fp32, and models with fused modules against the same models without."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from oneblock.infer.cache import KVCache
from oneblock.kernels import build
from oneblock.kernels.cpu_modules import FusedBlock, FusedMlp, FusedNorm, optimize_for_cpu
from oneblock.kernels.linear import SkinnyGemmLinear, fused_linear
from oneblock.kernels.substitution import as_subclass
from oneblock.model import Decoder, init_weights
from oneblock.model.context import ForwardContext
from oneblock.model.mlp import Mlp
from oneblock.model.norm import Norm
from oneblock.model.rope import apply_rope
from oneblock.quant.formats import quantize_int4, quantize_int8
from oneblock.quant.linear import QuantizedLinear
from oneblock.quant.quantize import QuantConfig, quantize
from oneblock.spec import get_spec, parts

kernels = pytest.mark.skipif(not build.is_available(), reason=build.unavailable_reason() or "available")
ROWS = (1, 2, 3, 4, 5, 8, 9, 16)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


@kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 8), (48, 5), (100, 17), (768, 300), (2048, 64)])
def test_fused_bf16_linears(rows: int, n_in: int, n_out: int) -> None:
    torch.manual_seed(0)
    layers = [as_subclass(torch.nn.Linear(n_in, n, dtype=torch.bfloat16), SkinnyGemmLinear) for n in (n_out, 3, n_out)]
    x = torch.randn(1, rows, n_in).bfloat16()
    with torch.no_grad():
        for y, layer in zip(fused_linear(x, *layers), layers, strict=True):
            expected = copy.deepcopy(layer).float()(x.float())
            assert y.shape == expected.shape
            assert relative_error(y, expected) < 0.004  # one bf16 rounding


@kernels
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 15, 40])
@pytest.mark.parametrize(
    ("n_in", "n_out", "group"), [(64, 5, 0), (96, 40, 32), (768, 33, 128), (48, 16, 0), (256, 7, 64)]
)
def test_quantized_linears(rows: int, n_in: int, n_out: int, group: int) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(n_out, n_in, group, torch.randn(n_out).bfloat16())
    weight = torch.randn(n_out, n_in)
    layer.set_weight(*(quantize_int4(weight, group) if group else quantize_int8(weight)))
    x = torch.randn(rows, n_in).bfloat16()
    assert layer.bias is not None
    expected = F.linear(x.float(), layer.dequantize(), layer.bias.float())
    with torch.no_grad():
        assert relative_error(layer(x), expected) < (0.012 if group else 0.004)  # int4 layers round activations to int8
    assert relative_error(layer.forward_dequantized(x), expected) < 0.01


FORMATS = {"bf16": None, "int8": QuantConfig(8), "int4": QuantConfig(4, 32)}


@kernels
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "phi"])
def test_fused_post_attention(family: str, rows: int, weights: str) -> None:
    torch.manual_seed(0)
    dim, hidden_dim = (72, 100) if weights == "bf16" else (96, 160)  # bf16: also sizes that are no multiple of a vector
    model = (
        Decoder(get_spec(family, vocab=32, dim=dim, n_layers=1, n_heads=3, hidden_dim=hidden_dim, context=64))
        .bfloat16()
        .eval()
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    config = FORMATS[weights]
    model = model if config is None else quantize(model, config)
    plain = copy.deepcopy(model.blocks[0]).float()
    optimize_for_cpu(model)
    block = model.blocks[0]
    assert isinstance(block, FusedBlock)
    x, positions = torch.randn(rows, 1, dim).bfloat16(), torch.zeros(rows, 1, dtype=torch.long)
    with torch.no_grad():
        is_fused = block.kernel_args_after_attention(x.dtype) is not None
        assert is_fused == (family != "phi"), "phi has a parallel residual"
        actual = block(x, ForwardContext(positions, has_default_positions=False), 0)
        expected = plain(x.float(), ForwardContext(positions, has_default_positions=False), 0)
        assert relative_error(actual, expected) < 0.015
        for _ in range(200):  # any schedule of threads gives the same bits
            assert torch.equal(block(x, ForwardContext(positions, has_default_positions=False), 0), actual)


@kernels
def test_more_threads_than_cores_give_the_same_bits() -> None:
    torch.set_num_threads(7)
    model = small("llama").bfloat16().eval()
    optimize_for_cpu(model)
    with torch.no_grad():
        actual = model(torch.tensor([[3]]))
        torch.set_num_threads(1)
        assert torch.equal(model(torch.tensor([[3]])), actual)


@kernels
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "keys"), [(4, 4, 32, 1), (8, 2, 64, 100), (6, 1, 128, 33)])
def test_decode_attention(heads: int, kv_heads: int, dim: int, keys: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, heads, 1, dim).bfloat16()
    k, v = (torch.randn(3, kv_heads, keys + 20, dim).bfloat16()[:, :, :keys] for _ in range(2))
    mask = torch.rand(3, keys) > 0.3
    mask[:, 0] = True
    k.masked_fill_(~mask[:, None, :, None], 99.0)  # masked keys have no effect
    actual = torch.ops.oneblock_cpu.decode_attention(q, k, v, mask, 0.2)
    expected = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), mask[:, None, None], scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.01)


def small(family: str, **more: int) -> Decoder:
    sizes = {"vocab": 96, "dim": 64, "n_layers": 2, "n_heads": 2, "context": 64, **more}
    model = Decoder(get_spec(family, **sizes))
    init_weights(model, 0)
    return model


@kernels
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_an_optimized_model_gives_the_same_logits(family: str) -> None:
    model = small(family).bfloat16().eval()
    names = [name for name, _ in model.named_parameters()]
    ids = torch.randint(96, (3, 9))

    @torch.no_grad()
    def logits() -> torch.Tensor:
        cache = KVCache(model.spec, 3, 16, torch.bfloat16)
        return torch.cat(
            [model(ids[:, :6], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in (6, 7, 8)], 1
        )

    before = logits()
    optimize_for_cpu(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert any(isinstance(m, SkinnyGemmLinear) for m in model.modules())
    assert relative_error(logits(), before.float()) < 0.02
    loss = model(ids).float().logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None for p in model.blocks[0].attn.parameters())


def test_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ONEBLOCK_KERNELS", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build.unavailable_reason, build.library_path):
        monkeypatch.setattr(build, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build.REQUIRED_CPU_FLAGS))
    assert build.unavailable_reason() == "no C++ compiler found (no-such-compiler)"
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset())
    assert build.unavailable_reason() == "this processor has no avx512f"
    monkeypatch.setenv("ONEBLOCK_KERNELS", "0")
    assert build.unavailable_reason() == "ONEBLOCK_KERNELS is 0"


def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **rest: object) -> None:
        raise subprocess.CalledProcessError(1, "g++", stderr=b"error: too old\nmore")

    monkeypatch.delenv("ONEBLOCK_KERNELS", raising=False)
    monkeypatch.setattr(build, "library_path", lambda: tmp_path / "none.so")
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build.REQUIRED_CPU_FLAGS))
    monkeypatch.setattr(subprocess, "run", fail)
    assert build.unavailable_reason.__wrapped__().endswith("failed: error: too old")


# ------------------------------------------------------------------ norm, activation, RoPE, softmax


@kernels
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 1, 768), (2, 5, 100), (40, 2050)], ids=str)
def test_norms(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    changes = (
        [{}, {"scale_in_fp32": True}, {"weight_offset": 1.0, "scale_in_fp32": True}]
        if kind == "rms"
        else [{}, {"bias": True}]
    )
    for change in changes:
        norm = Norm(parts.Norm(**{"kind": kind, **change}), shape[-1]).bfloat16()
        for p in norm.parameters():
            p.data.normal_(0.5)
        x = torch.randn(shape).bfloat16() * 3 + 1
        with torch.inference_mode():
            ours, theirs = as_subclass(norm, FusedNorm)(x), norm(x)
            exact = norm.float()(x.float())
        assert ours.shape == x.shape
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, exact) < 1.1 * relative_error(theirs, exact)


@kernels
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "quick_gelu", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_fused_mlp(rows: int, act: str, gated: bool) -> None:
    torch.manual_seed(0)
    mlp = Mlp(parts.Mlp(hidden_dim=100, act=act, gated=gated), 64).bfloat16()
    x = 3 * torch.randn(2, rows, 64).bfloat16()
    with torch.inference_mode():
        before = mlp(x)
        exact = mlp.float()(x.float())
        fused = as_subclass(mlp.bfloat16(), FusedMlp)
        assert relative_error(fused(x), exact) < max(1.1 * relative_error(before, exact), 0.005)


@kernels
@pytest.mark.parametrize(("heads", "head_dim", "part"), [(3, 64, 64), (2, 80, 32), (1, 6, 4)])
def test_apply_rope(heads: int, head_dim: int, part: int) -> None:
    torch.manual_seed(0)
    for rows in (1, 2):
        cos, sin = (torch.randn(rows, 7, 1, part // 2).bfloat16() for _ in range(2))
        x = torch.randn(2, 7, heads * head_dim + 5).bfloat16()[..., 5:].unflatten(-1, (heads, head_dim))
        exact = apply_rope(x.float(), cos.float(), sin.float(), False)
        with torch.inference_mode():
            y = torch.ops.oneblock_cpu.apply_rope(x, cos, sin)
        assert y.is_contiguous()
        assert relative_error(y, exact) < 0.004


@kernels
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (7, 7), (5, 40), (128, 300)])
def test_causal_softmax(rows: int, keys: int) -> None:
    torch.manual_seed(0)
    scores = 8 * torch.randn(2, 3 * rows, keys).bfloat16()
    visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).repeat(3, 1)
    exact = (scores.float() * 0.3).masked_fill(~visible, -torch.inf).softmax(-1)
    torch.ops.oneblock_cpu.causal_softmax(scores, rows, 0.3)
    assert bool((scores[:, ~visible] == 0).all())
    assert relative_error(scores, exact) < 0.004


def test_gradients_go_through_an_optimized_model() -> None:
    model = Decoder(get_spec("llama", vocab=64, dim=64, n_layers=2, n_heads=2, hidden_dim=128)).bfloat16()
    init_weights(model, 0)
    optimize_for_cpu(model)
    model(torch.arange(9)[None]).float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
