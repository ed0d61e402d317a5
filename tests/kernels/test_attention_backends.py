"""Every attention backend equals the reference on every kind of mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oneblock.infer.cache import KVCache
from oneblock.kernels import build
from oneblock.kernels.attention.backend import FastAttention, Kernel, select_kernel
from oneblock.kernels.attention.blocked_matmul import blocked_matmul
from oneblock.kernels.attention.cpu_operators import causal_prefill, decode_attention
from oneblock.kernels.attention.eager import eager
from oneblock.kernels.attention.flex import flex
from oneblock.kernels.attention.sdpa import sdpa
from oneblock.model.context import AttentionBackend, Dropout, ForwardContext, MaskKind, reference_attention
from oneblock.spec import Attention, Layer, Mlp, Spec

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
ROWS, DIM = 2, 32


@dataclass
class Case:
    """One pass: `length` new tokens per row after `cached` ones."""

    kind: MaskKind
    spec: dict[str, Any] = field(default_factory=dict)
    length: int = 21
    cached: int = 0
    pads: tuple[int, ...] = (0, 0)  # of each row, on the left
    explicit: bool = False  # positions are given, so masks cannot follow from shapes
    documents: tuple[int, ...] = ()  # lengths of packed documents
    cu_seqlens: tuple[int, ...] = ()  # a varlen batch
    image: int = 0  # tokens that cross-attention reads
    keep: int | None = None  # queries of the last columns only


CASES = {
    "none, one query": Case("none", length=1, cached=9),
    "none, one query of each head": Case("none", {"n_kv_heads": 4}, length=1, cached=9),
    "none, image": Case("none", {"cross": True}, image=13),
    "causal": Case("causal"),
    "causal, one KV head": Case("causal", {"n_kv_heads": 1, "scale": 0.2}),
    "causal, no GQA": Case("causal", {"n_kv_heads": 4}),
    "causal, several blocks": Case("causal", length=300),
    "causal_lower_right": Case("causal_lower_right", length=11, cached=10),
    "causal_lower_right, several blocks": Case("causal_lower_right", length=300, cached=30),
    "causal_lower_right, last columns": Case("causal_lower_right", length=21, cached=10, keep=5),
    "explicit": Case("explicit", explicit=True),
    "explicit, several blocks": Case("explicit", length=600, explicit=True),
    "left-padded rows": Case("explicit", pads=(0, 7)),
    "left-padded rows, cached": Case("explicit", length=5, cached=16, pads=(9, 0)),
    "left-padded rows, decode": Case("explicit", length=1, cached=16, pads=(9, 0)),
    "window": Case("explicit", {"window": 7}),
    "window, several blocks": Case("explicit", {"window": 40}, length=600),
    "window, cached": Case("explicit", {"window": 7}, length=6, cached=15),
    "window, decode": Case("none", {"window": 7}, length=1, cached=20),
    "chunk": Case("explicit", {"chunk": 9}),
    "chunk, several blocks": Case("explicit", {"chunk": 100}, length=600),
    "chunk, decode": Case("explicit", {"chunk": 9}, length=1, cached=12),
    "documents": Case("explicit", length=21, documents=(8, 13)),
    "varlen": Case("explicit", length=21, cu_seqlens=(0, 8, 9, 21)),
    "soft cap": Case("causal", {"softcap": 2.0}),
    "soft cap, window": Case("explicit", {"softcap": 2.0, "window": 7}),
    "soft cap, decode": Case("none", {"softcap": 2.0}, length=1, cached=9),
    "soft cap, left-padded rows": Case("explicit", {"softcap": 2.0}, pads=(0, 7)),
    "sinks": Case("causal", {"sinks": True}),
    "sinks, cached": Case("causal_lower_right", {"sinks": True}, length=11, cached=10),
    "sinks, window, several blocks": Case("explicit", {"sinks": True, "window": 40}, length=600),
}
NEEDS_SCORES = {name for name, case in CASES.items() if {"softcap", "sinks"} & case.spec.keys()}
CAUSAL = {name for name, case in CASES.items() if case.kind.startswith("causal")}
BACKENDS = {
    "eager": (eager, set(CASES)),
    "sdpa": (sdpa, CASES.keys() - NEEDS_SCORES),
    "flex": (flex, set(CASES)),
    "blocked_matmul": (blocked_matmul, CAUSAL - NEEDS_SCORES),
    "selected": (None, set(CASES)),
}
DECODE = {name for name, case in CASES.items() if case.length == 1}
CPU_OPERATORS = {
    "decode_attention": (decode_attention, DECODE - NEEDS_SCORES),
    "causal_prefill": (causal_prefill, CAUSAL - NEEDS_SCORES),
    "selected": (None, set(CASES)),
}


def pairs(backends: dict[str, tuple[Kernel | None, set[str]]]) -> list[Any]:
    """Every backend with every case that it computes."""
    return [
        pytest.param(kernel, name, id=f"{backend}-{name}")
        for backend, (kernel, supported) in backends.items()
        for name in CASES
        if name in supported
    ]


def attend(
    case: Case, backend: AttentionBackend, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """One layer's attention of the case's last pass, (N, H, D), and its inputs q, k, v."""
    spec = replace(Attention(4, 2, DIM), **case.spec)
    rows = 1 if case.cu_seqlens else ROWS
    total = case.cached + case.length
    generator = torch.Generator().manual_seed(0)  # dropout uses the global one

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)

    sinks = randn(spec.n_heads).float() if spec.sinks else None
    q = randn(rows, total, spec.n_heads, DIM)[:, case.cached :]
    k, v = (randn(rows, case.image or total, spec.n_kv_heads, DIM) for _ in "kv")
    positions = torch.arange(total) - torch.tensor(case.pads)[:, None]
    documents, cu_seqlens = None, None
    if case.documents:
        documents = torch.repeat_interleave(torch.arange(len(case.documents)), torch.tensor(case.documents))[None]
        positions = torch.cat([torch.arange(n) for n in case.documents])[None]
    if case.cu_seqlens:
        cu_seqlens = torch.tensor(case.cu_seqlens)
        positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])[None]
    default = not (any(case.pads) or case.explicit or case.documents or case.cu_seqlens)
    positions = torch.arange(total)[None] if default else positions
    cache = None
    if case.cached:
        layer = Layer(spec, Mlp(8))
        cache = KVCache(Spec(vocab=8, dim=8, n_layers=1, pattern=(layer,), context=total), rows, total, dtype)
        cache.begin(positions[:, : case.cached])
        cache.update(0, *(x[:, : case.cached].transpose(1, 2) for x in (k, v)))
        cache.end()
        cache.begin(positions[:, case.cached :])
        k, v = (x[:, case.cached :] for x in (k, v))
    image = torch.zeros(rows, case.image, 1) if case.image else None
    ctx = ForwardContext(
        positions[:, case.cached :], default, case.cached, cache, image, documents, Dropout(attn=dropout),
        backend, cu_seqlens, rows, case.keep,
    )  # fmt: skip
    inputs = [ctx.select_queries(q), k, v]
    if not case.cached:
        inputs = [x.detach().requires_grad_(torch.is_grad_enabled()) for x in inputs]
    y = ctx.query_context.attend(0, spec, *(x.flatten(0, 1) for x in inputs), sinks)
    n_keys = case.image or (cache.key_positions(0).shape[1] if cache is not None else total)
    assert ctx.query_context.mask_kind(spec, n_keys) == case.kind
    return y, inputs


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "name"), pairs(BACKENDS))
def test_backends_equal_the_reference(kernel: Kernel | None, name: str) -> None:
    expected, _ = attend(CASES[name], reference_attention)
    y, _ = attend(CASES[name], FastAttention(kernel))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


WITHOUT_CACHE = {name for name, case in CASES.items() if not case.cached}
DIFFERENTIABLE = {name: (x, cases & WITHOUT_CACHE) for name, (x, cases) in BACKENDS.items() if name != "flex"}


@pytest.mark.parametrize(("kernel", "name"), pairs(DIFFERENTIABLE))
def test_gradients_equal_the_reference(kernel: Kernel | None, name: str) -> None:
    gradients = []
    for backend in (reference_attention, FastAttention(kernel)):
        y, inputs = attend(CASES[name], backend)
        gradients.append(torch.autograd.grad(y.square().sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not build.is_available(), reason=build.unavailable_reason() or "kernels are available")
@torch.no_grad()
@pytest.mark.parametrize(("kernel", "name"), pairs(CPU_OPERATORS))
def test_cpu_operators_in_bf16_equal_the_reference(kernel: Kernel | None, name: str) -> None:
    expected, _ = attend(CASES[name], reference_attention, torch.bfloat16)
    y, _ = attend(CASES[name], FastAttention(kernel, use_cpu_operators=True), torch.bfloat16)
    assert (y - expected).norm() / expected.norm() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("kernel", [eager, sdpa, blocked_matmul])
def test_dropout_of_attention_weights_keeps_the_mean(kernel: Kernel) -> None:
    torch.manual_seed(0)
    exact, _ = attend(CASES["causal"], reference_attention)
    outputs = [attend(CASES["causal"], FastAttention(kernel), dropout=0.3)[0] for _ in range(400)]
    assert (outputs[0] - exact).norm() / exact.norm() > 0.2
    assert (sum(outputs) / 400 - exact).norm() / exact.norm() < 0.05


def test_a_kernel_is_selected_once_per_pass_and_kind_of_layer() -> None:
    selections: list[tuple[int | None, bool]] = []
    spec = Attention(4, 2, DIM)
    ctx = ForwardContext(torch.arange(9)[None], True, backend=FastAttention())
    q, k, v = (torch.randn(9, n, DIM) for n in (4, 2, 2))

    def count(*args: Any) -> Any:
        selections.append((args[0].window, args[0].softcap is None))
        return select_kernel(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneblock.kernels.attention.backend.select_kernel", count)
        for layer in range(6):
            ctx.attend(layer, replace(spec, window=4 if layer % 3 else None), q, k, v, None)
    assert selections == [(None, True), (4, True)]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.length >= 128])
def test_flex_on_cuda(name: str, device: str) -> None:
    with torch.device(device):
        expected, _ = attend(CASES[name], reference_attention)
        y, _ = attend(CASES[name], FastAttention(flex))
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)
