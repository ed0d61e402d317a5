"""The builders' shared parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.errors import OneblockError
from oneblock.spec import Attention, Layer, Mlp, Spec
from oneblock.spec.build import fold, gated_hidden_dim, heads, longrope_attention_factor, spread, yarn_attention_factor

KINDS = tuple(Layer(Attention(4, 4, 16, window=window), Mlp(64)) for window in (None, 8, 32))
depths = st.lists(st.sampled_from(KINDS), min_size=1, max_size=24)


@given(depths)
def test_folded_layers_unfold_to_the_same(layers: list[Layer]):
    spec = Spec(256, 64, len(layers), fold(layers), context=64)
    assert list(spec.layers) == layers


@given(depths, st.integers(1, 4))
def test_the_pattern_is_the_shortest(layers: list[Layer], times: int):
    depth = layers * times
    pattern = fold(depth)
    assert len(pattern) <= len(layers)
    for shorter in range(1, len(pattern)):
        assert list(spread(depth[:shorter], len(depth))) != depth


def test_a_pattern_may_be_cut_off_at_the_depth():
    a, b, _ = KINDS
    assert fold([a, b, a, b, a]) == (a, b)
    assert fold([a, a, b]) == (a, a, b)
    assert fold([a, a, a]) == (a,)


def test_kinds_start_again_and_are_cut_off():
    assert spread((True, False), 5) == (True, False, True, False, True)
    assert spread((True, True, False), 2) == (True, True)


def test_heads_are_filled_in():
    assert heads(64, 4, None, None) == (4, 4, 16)
    assert heads(64, 4, 2, 32) == (4, 2, 32)


@pytest.mark.parametrize(("sizes", "says"), [((65, 4, None, None), "65 cannot"), ((64, 6, 4, 16), "must divide")])
def test_heads_that_do_not_fit(sizes: tuple[int, int, int | None, int | None], says: str):
    with pytest.raises(OneblockError, match=says):
        heads(*sizes)


@given(st.integers(1, 20_000))
def test_gated_hidden_is_just_over_eight_thirds(dim: int):
    hidden_dim = gated_hidden_dim(dim)
    assert hidden_dim % 32 == 0
    assert 0 <= hidden_dim - dim * 8 / 3 < 32


def test_gains_of_published_models():
    assert yarn_attention_factor(32.0) == pytest.approx(1.3465735902799727)  # gpt-oss
    assert longrope_attention_factor(32.0, 4096) == pytest.approx(1.1902380714238083)  # Phi-3-mini-128k
    assert yarn_attention_factor(1.0) == longrope_attention_factor(0.5, 4096) == 1.0
