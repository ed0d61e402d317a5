"""Our C++ products and attention against torch's, and the model that uses them against the one that does not."""

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
from oneblock.kernels.cpu_modules import Inner, Normed, optimize_for_cpu, streamed
from oneblock.model import Decoder, init_weights
from oneblock.model.context import ForwardContext
from oneblock.model.mlp import Mlp
from oneblock.model.norm import Norm
from oneblock.model.rope import rotate
from oneblock.quant.formats import quantize_int4, quantize_int8
from oneblock.quant.linear import QuantizedLinear, SkinnyGemmLinear, product
from oneblock.quant.quantize import QuantConfig, quantize
from oneblock.spec import get_spec, parts

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
    layer = QuantizedLinear(n_out, n_in, group, torch.randn(n_out).bfloat16())
    weight = torch.randn(n_out, n_in)
    layer.fill(*(quantize_int4(weight, group) if group else quantize_int8(weight)))
    x = torch.randn(rows, n_in).bfloat16()
    assert layer.bias is not None
    expected = F.linear(x.float(), layer.rows(), layer.bias.float())
    with torch.no_grad():
        assert wrong(layer(x), expected) < (0.012 if group else 0.004)  # 4 bits take activations in 8
    assert wrong(layer.plain(x), expected) < 0.01


FORMS = {"bf16": None, "8 bits": QuantConfig(8), "4 bits": QuantConfig(4, 32)}


@kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "phi"])
def test_the_rest_of_a_block(family: str, rows: int, form: str) -> None:
    """After attention: products, norm and activation as one operator, and as the plain module in fp32."""
    torch.manual_seed(0)
    dim, hidden_dim = (72, 100) if form == "bf16" else (96, 160)  # of bf16 the ends of rows as well
    model = (
        Decoder(get_spec(family, vocab=32, dim=dim, n_layers=1, n_heads=3, hidden_dim=hidden_dim, context=64))
        .bfloat16()
        .eval()
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    bits = FORMS[form]
    block = (model if bits is None else quantize(model, bits)).blocks[0]
    plain = copy.deepcopy(block).float()
    optimize_for_cpu(model)
    x, positions = torch.randn(rows, 1, dim).bfloat16(), torch.zeros(rows, 1, dtype=torch.long)
    assert ("forward" in vars(block)) == (family != "phi")  # attention and MLP side by side: as it was
    with torch.no_grad():
        found = block(x, ForwardContext(positions, ordered=False), 0)
        assert wrong(found, plain(x.float(), ForwardContext(positions, ordered=False), 0)) < 0.015
        for _ in range(200):  # whichever thread does what
            assert torch.equal(block(x, ForwardContext(positions, ordered=False), 0), found)


@kernels
def test_more_threads_than_cores() -> None:
    """Those that wait let the others have the core."""
    torch.set_num_threads(7)
    model = small("llama").bfloat16().eval()
    optimize_for_cpu(model)
    with torch.no_grad():
        found = model(torch.tensor([[3]]))
        torch.set_num_threads(1)
        assert torch.equal(model(torch.tensor([[3]])), found)


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
    model = Decoder(get_spec(family, **sizes))
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
    optimize_for_cpu(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert any(isinstance(m, SkinnyGemmLinear) for m in model.modules())
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


# ------------------------------------------------------------------ what lies between the products


@kernels
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 1, 768), (2, 5, 100), (40, 2050)], ids=str)
def test_norms(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    changes = [{}, {"gain": "before"}, {"offset": 1.0, "gain": "before"}] if kind == "rms" else [{}, {"bias": True}]
    for change in changes:
        norm = Norm(parts.Norm(**{"kind": kind, **change}), shape[-1]).bfloat16()
        for p in norm.parameters():
            p.data.normal_(0.5)
        x = torch.randn(shape).bfloat16() * 3 + 1
        with torch.inference_mode():
            ours, theirs = Normed(norm)(x), norm(x)
            exact = norm.float()(x.float())
        assert ours.shape == x.shape
        assert ours.dtype == torch.bfloat16
        assert wrong(ours, exact) < 1.1 * wrong(theirs, exact)


@kernels
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "quick_gelu", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_feed_forwards(rows: int, act: str, gated: bool) -> None:
    torch.manual_seed(0)
    mlp = Mlp(parts.Mlp(hidden_dim=100, act=act, gated=gated), 64).bfloat16()
    x = 3 * torch.randn(2, rows, 64).bfloat16()
    with torch.inference_mode():
        before = mlp(x)
        exact = mlp.float()(x.float())
        mlp.bfloat16().inner = Inner(mlp)
        assert wrong(mlp(x), exact) < max(1.1 * wrong(before, exact), 0.005)


@kernels
@pytest.mark.parametrize(("heads", "head_dim", "part"), [(3, 64, 64), (2, 80, 32), (1, 6, 4)])
def test_heads_turned(heads: int, head_dim: int, part: int) -> None:
    torch.manual_seed(0)
    for rows in (1, 2):
        cos, sin = (torch.randn(rows, 1, 7, part // 2).bfloat16() for _ in range(2))
        x = torch.randn(2, 7, heads * head_dim + 5).bfloat16()[..., 5:].unflatten(-1, (heads, head_dim)).transpose(1, 2)
        exact = rotate(x.float(), cos.float(), sin.float(), False)
        with torch.inference_mode():
            y = torch.ops.oneblock_rows.turned(x, cos, sin)
        assert y.is_contiguous()
        assert wrong(y, exact) < 0.004


@kernels
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (7, 7), (5, 40), (128, 300)])
def test_weights_of_many_queries(rows: int, keys: int) -> None:
    torch.manual_seed(0)
    scores = 8 * torch.randn(2, 3 * rows, keys).bfloat16()
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).repeat(3, 1)
    exact = (scores.float() * 0.3).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.ops.oneblock_rows.weigh(scores, rows, 0.3)
    assert bool((scores[:, ~seen] == 0).all())
    assert wrong(scores, exact) < 0.004


def test_gradients_go_through_a_model_that_was_made_ready() -> None:
    """What is asked for gradients takes torch's own operators."""
    model = Decoder(get_spec("llama", vocab=64, dim=64, n_layers=2, n_heads=2, hidden_dim=128)).bfloat16()
    init_weights(model, 0)
    optimize_for_cpu(model)
    model(torch.arange(9)[None]).float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
