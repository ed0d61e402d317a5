"""Attention: its definition, masks, padding, documents, compilation, and memory linear in the sequence length."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from oneblock.kernels.attention import blocked_matmul, eager
from oneblock.kernels.attention.backend import FastAttention
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import AttentionBackend, Decoder, Dropout, ForwardContext
from oneblock.model.context import reference_attention
from oneblock.spec import Attention, Layer, Llama3Scaling, Mlp, Moe, Rope, Spec

VARIANTS = {
    "full": {},
    "window": {"window": 7},
    "chunk": {"chunk": 9},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True, "window": 5},
    "soft cap, chunk": {"softcap": 1.0, "chunk": 16},
    "temperature tuning": {"temperature_tuning": (4.0, 0.5), "rope": None},
    "interleaved": {"rope": Rope(interleaved=True, dim=4)},
    "one KV head": {"n_kv_heads": 1, "scale": 0.2},
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
def attention_by_definition(
    spec: Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention as its definition says, one query at a time."""
    a = spec.layers[0].attn
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        visible = [
            j
            for j in range(i + 1)
            if (a.window is None or i - j < a.window) and (a.chunk is None or i // a.chunk == j // a.chunk)
        ]
        group = h // (a.n_heads // a.n_kv_heads)
        scores = k[b, group, visible] @ q[b, h, i] * (a.scale or a.head_dim**-0.5)
        if a.softcap:
            scores = a.softcap * torch.tanh(scores / a.softcap)
        total = scores.exp().sum() + (sinks[h].exp() if sinks is not None else 0)
        out[b, h, i] = (scores.exp() / total) @ v[b, group, visible]
    return out


@pytest.mark.parametrize("backend", [reference_attention, FastAttention()], ids=["reference", "fast"])
def test_backends_equal_the_definition(spec: Spec, backend: AttentionBackend) -> None:
    a = spec.layers[0].attn
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, n, 21, 8) for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads))
    sinks = torch.randn(a.n_heads) if a.sinks else None
    ctx = ForwardContext(torch.arange(21)[None], has_default_positions=True, backend=backend)
    y = attend(ctx, a, q, k, v, sinks)
    torch.testing.assert_close(y, attention_by_definition(spec, q, k, v, sinks), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_from_shapes_equal_masks_from_positions(spec: Spec) -> None:
    model, x = randomised(spec), ids(50)
    torch.testing.assert_close(model(x), model(x, positions=torch.arange(50)[None]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, torch.arange(50)[None]], ids=["default", "explicit"])
def test_blocks_of_queries_equal_one_block(
    spec: Spec, positions: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = randomised(spec), ids(50)
    expected = model(x, positions=positions)
    monkeypatch.setattr(eager, "MASK_BLOCK", 8)
    torch.testing.assert_close(model(x, positions=positions), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding_changes_no_output(spec: Spec) -> None:
    model, short, long = randomised(spec), ids(23, 1), ids(40, 1)
    padding = torch.zeros(1, 17, dtype=torch.long)
    rows = torch.cat((torch.cat((padding, short), 1), long))
    positions = torch.stack((torch.arange(-17, 23), torch.arange(40)))
    y = model(rows, positions=positions)
    assert y.isfinite().all()
    torch.testing.assert_close(y[0, 17:], model(short)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1], model(long)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_stays_inside_packed_documents(spec: Spec) -> None:
    model, first, second = randomised(spec), ids(23, 1), ids(14, 1)
    documents = torch.tensor([[0] * 23 + [1] * 14])
    positions = torch.cat((torch.arange(23), torch.arange(14)))[None]
    y = model(torch.cat((first, second), 1), positions=positions, documents=documents)
    torch.testing.assert_close(y[:, :23], model(first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[:, 23:], model(second), atol=1e-5, rtol=1e-5)


def test_each_dropout_changes_the_output() -> None:
    model, x = randomised(tiny(softcap=30.0)), ids(12, 1)
    without = model(x)
    torch.testing.assert_close(model(x, dropout=Dropout()), without)
    for place in ("embed", "attn", "residual", "mlp"):
        torch.manual_seed(0)
        assert (model(x, dropout=Dropout(**{place: 0.5})) - without).abs().max() > 1e-2, place


COMPILED = {
    "gqa, llama3 rope": tiny(rope=Rope(scaling=Llama3Scaling(8.0, 1.0, 4.0, 16))),
    "window": tiny(window=7),
    "sinks, experts": replace(
        tiny(sinks=True), pattern=(Layer(tiny(sinks=True).layers[0].attn, Moe(4, 2, Mlp(16)), "sandwich"),)
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks_and_once_for_all_lengths(name: str) -> None:
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
def test_blocked_matmul_in_bf16_is_as_exact_as_the_fused_kernel(length: int) -> None:
    a = Attention(6, 2, 32)
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, n, length, 32).bfloat16() for n in (6, 2, 2))
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert blocked_matmul.is_faster(q, q.shape[2])
    ctx = ForwardContext(torch.arange(length)[None], True, backend=FastAttention(), batch=2)
    y = attend(ctx, a, q, k, v, None)
    assert (y - exact).abs().mean() < 3 * (fused - exact).abs().mean() + 1e-4
    assert (y - exact).abs().max() < 0.05


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
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(process.stdout) < 240
