"""Every way to compute attention gives the same answer, in memory linear in the text."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from oneblock.infer.cache import KVCache
from oneblock.kernels.attention import blocked_matmul, eager
from oneblock.kernels.attention.backend import FastAttention
from oneblock.kernels.attention.flex import flex
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import Decoder, Dropout, ForwardContext
from oneblock.spec import Attention, Layer, Llama3Scaling, Mlp, Moe, Rope, Spec

VARIANTS = {
    "full": {},
    "window": {"window": 7},
    "chunk": {"chunk": 9},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True, "window": 5},
    "capped chunk": {"softcap": 1.0, "chunk": 16},
    "tempered": {"temperature_tuning": (4.0, 0.5), "rope": None},
    "interleaved": {"rope": Rope(interleaved=True, dim=4)},
    "one head": {"n_kv_heads": 1, "scale": 0.2},
}


def tiny(**changes: object) -> Spec:
    attn = replace(Attention(4, 2, 8, rope=Rope()), **changes)
    return Spec(vocab=61, dim=32, n_layers=2, pattern=(Layer(attn, Mlp(48)),), context=128)


def randomised(spec: Spec, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(spec).eval()
    use_fast_kernels(model)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(params=VARIANTS)
def spec(request: pytest.FixtureRequest) -> Spec:
    return tiny(**VARIANTS[request.param])


def attend(
    ctx: ForwardContext, a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """The context's attention of (B, heads, T, D) tensors."""
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return ctx.layout.to_batch(ctx.attend(0, a, *flat, sinks))


@torch.no_grad()
def by_hand(spec: Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention as its definition reads, one query at a time."""
    a = spec.layers[0].attn
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = [
            j
            for j in range(i + 1)
            if (a.window is None or i - j < a.window) and (a.chunk is None or i // a.chunk == j // a.chunk)
        ]
        group = h // (a.n_heads // a.n_kv_heads)
        scores = k[b, group, seen] @ q[b, h, i] * (a.scale or a.head_dim**-0.5)
        if a.softcap:
            scores = a.softcap * torch.tanh(scores / a.softcap)
        total = scores.exp().sum() + (sinks[h].exp() if sinks is not None else 0)
        out[b, h, i] = (scores.exp() / total) @ v[b, group, seen]
    return out


def test_the_definition(spec: Spec) -> None:
    a = spec.layers[0].attn
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, n, 21, 8) for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads))
    sinks = torch.randn(a.n_heads) if a.sinks else None
    ctx = ForwardContext(torch.arange(21)[None], has_default_positions=True, backend=FastAttention())
    got = attend(ctx, a, q, k, v, sinks)
    torch.testing.assert_close(got, by_hand(spec, q, k, v, sinks), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [2, 11])
def test_queries_after_keys_of_earlier_passes(spec: Spec, new: int, dtype: torch.dtype) -> None:
    """The last queries of a text over all of its keys: what they are when all are asked at once."""
    a = spec.layers[0].attn
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, n, 21, 8) for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads))
    sinks = torch.randn(a.n_heads) if a.sinks else None
    q, k, v = (x.to(dtype) for x in (q, k, v))
    cache = KVCache(spec, 2, 21, dtype)
    k_new, v_new = (x[:, :, -new:] for x in (k, v))
    cache.begin(torch.arange(21 - new)[None])
    cache.update(0, k[:, :, :-new], v[:, :, :-new])
    cache.end()
    cache.begin(torch.arange(21 - new, 21)[None])
    ctx = ForwardContext(torch.arange(21 - new, 21)[None], True, 21 - new, cache, backend=FastAttention(), batch=2)
    got = attend(ctx, a, q[:, :, -new:], k_new, v_new, sinks)
    expected = by_hand(spec, q.float(), k.float(), v.float(), sinks)[:, :, -new:]
    torch.testing.assert_close(got.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-2)


@torch.no_grad()
def test_masks_from_shapes_equal_masks_from_positions(spec: Spec) -> None:
    model, x = randomised(spec), ids(50)
    torch.testing.assert_close(model(x), model(x, positions=torch.arange(50)[None]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, torch.arange(50)[None]], ids=["ordered", "positions"])
def test_blocks_of_queries(spec: Spec, positions: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomised(spec), ids(50)
    whole = model(x, positions=positions)
    monkeypatch.setattr(eager, "MASK_BLOCK", 8)
    torch.testing.assert_close(model(x, positions=positions), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(spec: Spec) -> None:
    """The masks and score changes given to FlexAttention, run by torch's eager form of it."""
    model, x = randomised(spec), ids(50)
    expected = model(x)
    model.attention_backend = FastAttention(flex)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(spec: Spec) -> None:
    model, short, long = randomised(spec), ids(23, 1), ids(40, 1)
    pads = torch.zeros(1, 17, dtype=torch.long)
    rows = torch.cat((torch.cat((pads, short), 1), long))
    positions = torch.stack((torch.arange(-17, 23), torch.arange(40)))
    y = model(rows, positions=positions)
    assert y.isfinite().all()
    torch.testing.assert_close(y[0, 17:], model(short)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1], model(long)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(spec: Spec) -> None:
    model, one, two = randomised(spec), ids(23, 1), ids(14, 1)
    documents = torch.tensor([[0] * 23 + [1] * 14])
    positions = torch.cat((torch.arange(23), torch.arange(14)))[None]
    y = model(torch.cat((one, two), 1), positions=positions, documents=documents)
    torch.testing.assert_close(y[:, :23], model(one), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[:, 23:], model(two), atol=1e-5, rtol=1e-5)


def test_dropout_zeroes_and_keeps_the_mean() -> None:
    model, x = randomised(tiny(softcap=30.0)), ids(12, 1)
    plain = model(x)
    torch.testing.assert_close(model(x, dropout=Dropout()), plain)
    for place in ("embed", "attn", "residual", "mlp"):
        torch.manual_seed(0)
        assert (model(x, dropout=Dropout(**{place: 0.5})) - plain).abs().max() > 1e-2, place
    hidden = torch.ones(20_000)
    assert torch.nn.functional.dropout(hidden, 0.3).mean() == pytest.approx(1.0, abs=0.05)


COMPILED = {
    "gqa, llama3 rope": tiny(rope=Rope(scaling=Llama3Scaling(8.0, 1.0, 4.0, 16))),
    "window": tiny(window=7),
    "sinks, experts": replace(
        tiny(sinks=True), pattern=(Layer(tiny(sinks=True).layers[0].attn, Moe(4, 2, Mlp(16)), "sandwich"),)
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole_and_once_for_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = randomised(COMPILED[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (50, 33, 41, 20, 64):
        torch.testing.assert_close(compiled(ids(length)), model(ids(length)), atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2  # one for the first length, one for every other
    assert not counters["graph_break"]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 100, 128, 129, 300])
def test_products_of_bf16_stay_as_close_to_the_truth_as_the_fused_kernel(length: int) -> None:
    a = Attention(6, 2, 32)
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, n, length, 32).bfloat16() for n in (6, 2, 2))
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert blocked_matmul.is_faster(q, q.shape[2])
    ctx = ForwardContext(torch.arange(length)[None], True, backend=FastAttention(), batch=2)
    got = attend(ctx, a, q, k, v, None)
    assert (got - exact).abs().mean() < 3 * (fused - exact).abs().mean() + 1e-4
    assert (got - exact).abs().max() < 0.05


LONG = """
import resource, torch
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import Decoder
from oneblock.spec import Attention, Layer, Mlp, Rope, Spec
torch.set_num_threads(1)
attn = Attention(4, 2, 64, rope=Rope(), {options})
model = Decoder(Spec(vocab=61, dim=256, n_layers=1, pattern=(Layer(attn, Mlp(64)),), context=16384)).to({dtype})
use_fast_kernels(model)
def peak():
    with torch.no_grad():
        model.hidden_states(torch.zeros(1, length, dtype=torch.long), positions={positions})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
length = 512
before = peak()
length = 16384
print((peak() - before) / 1024)
"""


@pytest.mark.parametrize(
    ("options", "positions", "dtype"),
    [("", "None", "torch.float32"), ("", "None", "torch.bfloat16"), ("window=512", "None", "torch.float32"),
     ("chunk=4096", "None", "torch.float32"), ("sinks=True, window=128", "None", "torch.float32"),
     ("", "torch.arange(length)[None]", "torch.float32")],
)  # fmt: skip
def test_16k_prefill_is_not_quadratic_in_memory(options: str, positions: str, dtype: str) -> None:
    """A 16,384 x 16,384 mask alone would be 256 MiB as bytes, the scores of one head 1,024 MiB."""
    code = LONG.format(options=options, positions=positions, dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 240


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_short_texts_train_by_products_to_the_same_gradients(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(tiny(n_kv_heads=kv_heads))
    found = []
    for limits in (blocked_matmul.MATMUL_MAX_TRAINING_TOKENS, {}):
        monkeypatch.setattr(blocked_matmul, "MATMUL_MAX_TRAINING_TOKENS", limits)
        model.zero_grad()
        loss = model(ids(40)).log_softmax(-1).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
