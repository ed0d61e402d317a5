"""FLOPs and bytes per token: by hand and by counting every visible pair."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.errors import OneblockError
from oneblock.plan import bytes_decoded, flops, params, plan_model
from oneblock.spec import FAMILIES, Attention, Moe, Spec, get_spec

lengths = st.none() | st.integers(1, 40)


def pairs(a: Attention, context: int) -> int:
    """Query-key pairs that a text computes, by the definition of window and chunk."""
    return sum(
        (a.window is None or q - k < a.window) and (a.chunk is None or q // a.chunk == k // a.chunk)
        for q in range(context)
        for k in range(q + 1)
    )


@given(st.integers(1, 60), lengths, lengths)
def test_mean_span_counts_every_visible_pair(context: int, window: int | None, chunk: int | None):
    a = Attention(1, 1, 1, window=window, chunk=chunk)
    assert flops.mean_span(a, context) * context == pytest.approx(pairs(a, context))


def test_gpt2_by_hand():
    dim, layers, context = 768, 12, 1024
    products = 2 * (layers * 12 * dim * dim + 50257 * dim)
    got = plan_model(get_spec("gpt2"))
    assert got.flops_decode == products + layers * 4 * dim * context
    assert got.flops_prefill == products + layers * 4 * dim * (context + 1) / 2
    assert got.flops_train == 3 * got.flops_prefill


def test_grouped_queries_save_cache_but_not_the_work_of_scores():
    grouped, ungrouped = plan_model(get_spec("llama-3-8b")), plan_model(get_spec("llama-3-8b", n_kv_heads=32))
    saved = 32 * 2 * 2 * 4096 * (4096 - 1024)  # k and v projections of 32 layers
    assert ungrouped.flops_decode - grouped.flops_decode == saved


def test_work_is_about_six_flops_per_parameter_and_token():
    """The rule of thumb 6N, embeddings apart, holds where texts are short."""
    llama = get_spec("llama-2-7b")
    n = params.total(llama) - 32000 * 4096
    assert flops.train(llama, 1) == pytest.approx(6 * n, rel=0.001)
    assert flops.train(llama, 1, checkpointing=True) == pytest.approx(8 * n, rel=0.001)


def test_experts_cost_what_is_active():
    mixtral = get_spec("mixtral-8x7b")
    n = params.total(mixtral, active=True) - 32000 * 4096
    assert flops.matmuls(mixtral) == pytest.approx(2 * n, rel=0.001)


def test_llama_4_by_hand():
    dim, q, kv = 5120, 40 * 128, 8 * 128
    layer = 2 * dim * q + 2 * dim * kv + dim * 16 + 2 * 3 * dim * 8192  # one routed expert and the shared one
    assert flops.matmuls(get_spec("llama-4-scout")) == 2 * (48 * layer + 202048 * dim)


def test_images_wake_the_cross_attention_layers():
    vision = get_spec("llama-3.2-11b-vision")
    plain = get_spec("llama-3.1-8b")
    assert flops.decode(vision, 100) == flops.decode(plain, 100)  # 32 of 40 layers run: Llama 3.1 8B
    layer = 2 * (2 * 4096 * 4096 + 3 * 4096 * 14336) + 4 * 4096 * 6404
    assert flops.decode(vision, 100, image=6404) == flops.decode(plain, 100) + 8 * layer


@given(st.sampled_from([build() for build in FAMILIES.values()]), st.integers(1, 500), st.integers(1, 500))
def test_work_grows_with_the_text(built: Spec, a: int, b: int):
    short, long = sorted((a, b))
    assert flops.decode(built, short) <= flops.decode(built, long)
    assert flops.prefill(built, long) <= flops.decode(built, long)


def test_a_step_reads_every_weight_once_but_one_row_of_each_table():
    gpt2 = get_spec("gpt2")
    assert flops.weights_read(gpt2) == params.total(gpt2) - 1024 * 768 + 768 + 768  # tied: the head is the table
    llama = get_spec("llama-3-8b")
    assert flops.weights_read(llama, 5) == params.total(llama) - (128256 - 5) * 4096


def test_decoded_bytes_by_hand():
    llama, context = get_spec("llama-3-8b"), 8192
    weights = (params.total(llama) - (128256 - 4) * 4096) * 2 / 4
    assert bytes_decoded(llama, context, batch=4) == weights + 131072 * (context + 1)
    assert bytes_decoded(llama, context, 4, "int8") == weights / 2 * 1.0625 + 131072 * (context + 1)


def test_a_batch_wakes_more_experts():
    moe = get_spec("mixtral-8x7b").pattern[0].mlp
    assert isinstance(moe, Moe)
    assert flops.distinct_experts(moe, 1) == 2
    assert flops.distinct_experts(moe, 2) == pytest.approx(2 + 2 * 6 / 8)  # the second token's two, unless the same
    assert flops.distinct_experts(moe, 1000) == pytest.approx(8)
    assert flops.weights_read(get_spec("mixtral-8x7b"), 1) < flops.weights_read(get_spec("mixtral-8x7b"), 2)


@pytest.mark.parametrize("kwargs", [{"context": 0}, {"batch": 0}, {"image": -1}, {"dtype": "fp3"}])
def test_nonsense_is_refused(kwargs: dict[str, Any]):
    with pytest.raises(OneblockError, match=r"at least|unknown dtype"):
        plan_model(get_spec("gpt2"), **kwargs)
