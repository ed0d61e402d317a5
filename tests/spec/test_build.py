"""The parts that the families' builders share, and the limits on sizes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.errors import OneblockError
from oneblock.spec import FAMILIES, Attention, Layer, Mlp, Moe, Spec, get_spec
from oneblock.spec.build import (
    LIMITS,
    MAX_EXPERTS,
    Sizes,
    check_spec,
    fold_layers,
    gated_hidden_dim,
    longrope_attention_factor,
    repeat_to_depth,
    yarn_attention_factor,
)

KINDS = tuple(Layer(Attention(4, 4, 16, window=window), Mlp(64)) for window in (None, 8, 32))
depths = st.lists(st.sampled_from(KINDS), min_size=1, max_size=24)


@given(depths)
def test_folded_layers_unfold_to_the_same(layers: list[Layer]):
    spec = Spec(256, 64, len(layers), fold_layers(layers), context=64)
    assert list(spec.layers) == layers


@given(depths, st.integers(1, 4))
def test_the_pattern_is_the_shortest(layers: list[Layer], times: int):
    depth = layers * times
    pattern = fold_layers(depth)
    assert len(pattern) <= len(layers)
    for shorter in range(1, len(pattern)):
        assert list(repeat_to_depth(depth[:shorter], len(depth))) != depth


def test_a_pattern_may_be_cut_off_at_the_depth():
    a, b, _ = KINDS
    assert fold_layers([a, b, a, b, a]) == (a, b)
    assert fold_layers([a, a, b]) == (a, a, b)
    assert fold_layers([a, a, a]) == (a,)


def test_patterns_repeat_and_are_cut_off_at_the_depth():
    assert repeat_to_depth((True, False), 5) == (True, False, True, False, True)
    assert repeat_to_depth((True, True, False), 2) == (True, True)


def test_kv_heads_and_head_dim_have_defaults():
    assert Sizes().attention() == Attention(4, 4, 16)
    assert Sizes(n_kv_heads=2, head_dim=32).attention() == Attention(4, 2, 32)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 65}, "dim 65 is not divisible by n_heads=4"),
        ({"n_heads": 6, "n_kv_heads": 4, "head_dim": 16}, "n_heads=6 is not divisible by n_kv_heads=4"),
    ],
)
def test_heads_that_do_not_divide_are_refused(sizes: dict[str, Any], message: str):
    with pytest.raises(OneblockError, match=message):
        get_spec("llama", **sizes)


@given(st.integers(1, 20_000))
def test_gated_hidden_dim_is_just_over_eight_thirds(dim: int):
    hidden_dim = gated_hidden_dim(dim)
    assert hidden_dim % 32 == 0
    assert 0 <= hidden_dim - dim * 8 / 3 < 32


def test_attention_factors_of_published_models():
    assert yarn_attention_factor(32.0) == pytest.approx(1.3465735902799727)  # gpt-oss
    assert longrope_attention_factor(32.0, 4096) == pytest.approx(1.1902380714238083)  # Phi-3-mini-128k
    assert yarn_attention_factor(1.0) == longrope_attention_factor(0.5, 4096) == 1.0


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize("value", [0, -1, 10**6, 10**12, 10**400, 2.0, True, "2"], ids=lambda value: str(value)[:12])
def test_a_depth_outside_the_limits_is_refused_at_once(value: Any):
    start = time.perf_counter()
    with pytest.raises(OneblockError, match=r"^n_layers is .*, not an integer from 1 to 1,024; fix it$") as error:
        get_spec("llama", n_layers=value)
    assert time.perf_counter() - start < 1
    assert len(str(error.value)) < 120


@pytest.mark.parametrize(
    ("family", "keyword"), [(f, k) for f, build in FAMILIES.items() for k in build.keywords if k in LIMITS]
)
def test_every_size_has_a_limit(family: str, keyword: str):
    limit = LIMITS[keyword]
    with pytest.raises(OneblockError, match=f"^{keyword} is {limit + 1:,}, not an integer from 1 to {limit:,}; fix it"):
        get_spec(family, **{keyword: limit + 1})


def test_experts_are_limited_over_all_layers():
    with pytest.raises(OneblockError, match=f"1,024 layers x 65 experts is 66,560, above the limit of {MAX_EXPERTS:,}"):
        get_spec("mixtral", n_layers=1024, n_experts=65)


def test_every_size_of_a_spec_is_checked():
    spec = get_spec("mixtral")
    layer = spec.pattern[0]
    assert check_spec(spec) is spec
    assert isinstance(layer.mlp, Moe)
    bad_layers = (
        replace(layer, attn=replace(layer.attn, head_dim=0)),
        replace(layer, mlp=replace(layer.mlp, n_experts=1 << 20)),
        replace(layer, mlp=replace(layer.mlp, expert=Mlp(1 << 25))),
    )
    for bad in (
        replace(spec, vocab=1 << 25),
        replace(spec, pattern=spec.pattern * 3000),
        *(replace(spec, pattern=(each,)) for each in bad_layers),
    ):
        with pytest.raises(OneblockError, match="not an integer from 1 to"):
            check_spec(bad)


def test_published_models_are_far_below_the_limits():
    assert max(get_spec(name).n_layers for name in ("gpt3-175b", "llama-3.1-405b")) * 8 < LIMITS["n_layers"]


def test_a_deep_irregular_pattern_is_folded_quickly():
    layers = [KINDS[0]] * 1023 + [KINDS[1]]
    start = time.perf_counter()
    assert len(fold_layers(layers)) == 1024
    assert time.perf_counter() - start < 2
