"""KV cache: by hand, by brute force, and what must hold for any model."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.plan import plan_model
from oneblock.plan.cache import kv_bytes, kv_bytes_per_token, span
from oneblock.spec import FAMILIES, Attention, Spec, get_spec

specs = st.sampled_from([build() for build in FAMILIES.values()])
contexts = st.integers(1, 2000)


def test_llama_2_70b_with_and_without_grouped_queries():
    """The often quoted 350 GB is the figure for 64 KV heads; the model has 8."""
    grouped, ungrouped = get_spec("llama-2-70b"), get_spec("llama-2-70b", n_kv_heads=64)
    assert kv_bytes_per_token(grouped) == 2 * 80 * 8 * 128 * 2 == 327_680
    assert kv_bytes_per_token(ungrouped) == 2 * 80 * 64 * 128 * 2 == 2_621_440
    assert plan_model(grouped, context=4096, batch=32).serving.cache == 42_949_672_960  # 40 GiB
    assert plan_model(ungrouped, context=4096, batch=32).serving.cache == 343_597_383_680  # 320 GiB


@pytest.mark.parametrize(
    ("name", "context", "expected"),
    [
        ("gpt2", 8192, 12 * 2 * 768 * 2 * 8192),
        ("llama-3-8b", 8192, 32 * 2 * 1024 * 2 * 8192),
        ("gemma-2b", 8192, 18 * 2 * 256 * 2 * 8192),  # one KV head
        ("mistral-7b-v0.1", 32768, 32 * 2 * 1024 * 2 * 4096),  # never more than the window
        ("gemma-3-27b", 131072, 2 * 2048 * 2 * (52 * 1024 + 10 * 131072)),  # 62 layers, every 6th full
        ("llama-4-scout", 131072, 2 * 1024 * 2 * (36 * 8192 + 12 * 131072)),
        ("gpt-oss-20b", 131072, 2 * 512 * 2 * (12 * 128 + 12 * 131072)),
        ("llama-3.2-11b-vision", 1000, 32 * 2 * 1024 * 2 * 1000),  # 8 of 40 layers keep no text
    ],
)
def test_published_models(name: str, context: int, expected: int):
    assert kv_bytes(get_spec(name), context) == expected


def test_an_image_fills_the_cross_attention_layers():
    with_image, without = (kv_bytes(get_spec("llama-3.2-11b-vision"), 1000, image=n) for n in (6404, 0))
    assert with_image - without == 8 * 2 * 1024 * 2 * 6404


def visible(a: Attention, query: int) -> list[int]:
    """Keys that the query at a position sees, by the definition of window and chunk."""
    return [
        key
        for key in range(query + 1)
        if (a.window is None or query - key < a.window) and (a.chunk is None or query // a.chunk == key // a.chunk)
    ]


@given(st.integers(1, 60), st.none() | st.integers(1, 40), st.none() | st.integers(1, 40))
def test_a_layer_keeps_the_most_that_any_query_sees(context: int, window: int | None, chunk: int | None):
    a = Attention(1, 1, 1, window=window, chunk=chunk)
    assert span(a, context) == max(len(visible(a, query)) for query in range(context))


@given(specs, contexts, contexts)
def test_a_longer_text_never_needs_less(built: Spec, a: int, b: int):
    assert kv_bytes(built, min(a, b)) <= kv_bytes(built, max(a, b))


@given(specs, contexts)
def test_no_token_adds_more_than_the_first(built: Spec, context: int):
    assert 0 <= kv_bytes(built, context + 1) - kv_bytes(built, context) <= kv_bytes_per_token(built)
    assert kv_bytes(built, context) <= context * kv_bytes_per_token(built)


@given(contexts, st.integers(1, 500))
def test_a_window_caps_the_cache(context: int, window: int):
    built = FAMILIES["mistral"](window=window)
    assert kv_bytes(built, context) == kv_bytes(FAMILIES["mistral"](), min(context, window))


@given(specs, contexts)
def test_bytes_follow_the_dtype(built: Spec, context: int):
    assert kv_bytes(built, context, 4) == 2 * kv_bytes(built, context, 2)
    assert plan_model(built, context, dtype="float32").kv_bytes == 2 * plan_model(built, context, dtype="int4").kv_bytes


@given(specs, contexts, st.integers(1, 64))
def test_every_text_has_its_own_cache(built: Spec, context: int, batch: int):
    assert plan_model(built, context, batch).serving.cache == batch * plan_model(built, context).kv_bytes


def test_depth_counts_layers_not_patterns():
    gemma = get_spec("gemma-3-1b")
    assert kv_bytes(replace(gemma, n_layers=12), 10_000) * 13 // 6 != kv_bytes(gemma, 10_000)  # 26 layers: 22 + 4
    assert kv_bytes(gemma, 10_000) == 2 * 256 * 2 * (22 * 512 + 4 * 10_000)
