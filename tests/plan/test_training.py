"""Training: tokens, time and money."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.errors import OneblockError
from oneblock.plan import GPUS, plan_model, train_run
from oneblock.plan.training import BESIROGLU, HOFFMANN, Law, optimal_tokens, run
from oneblock.spec import get_spec


def test_a_run_by_hand():
    got = run(1e9, 1e12, GPUS["h100"], gpus=8, utilisation=0.5, price=2.0)
    assert got.flops == 1e21
    assert got.seconds == pytest.approx(1e21 / (8 * 989e12 * 0.5))
    assert got.dollars == pytest.approx(got.seconds / 3600 * 8 * 2.0)


@pytest.mark.parametrize(
    ("name", "context", "tokens", "published", "attention"),
    [
        ("gpt3-175b", 2048, 300e9, 3.14e23, 0.03),  # arXiv:2005.14165, appendix D
        ("llama-3.1-405b", 8192, 15.6e12, 3.8e25, 0.05),  # arXiv:2407.21783, section 3.2
    ],
)
def test_published_runs(name: str, context: int, tokens: float, published: float, attention: float):
    """Both papers count 6N a token, which leaves out attention's own work."""
    assert train_run(get_spec(name), 1, tokens).flops == pytest.approx(published, rel=0.01)
    whole = train_run(get_spec(name), context, tokens).flops
    assert 1 < whole / published < 1 + attention


def test_more_gpus_take_less_time_for_the_same_money():
    one, many = (train_run(get_spec("gpt2"), 1024, gpus=n) for n in (1, 64))
    assert many.seconds == pytest.approx(one.seconds / 64)
    assert many.dollars == pytest.approx(one.dollars)
    assert train_run(get_spec("gpt2"), 1024, checkpointing=True).seconds == pytest.approx(one.seconds / 8 * 4 / 3)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"gpu": "h900"}, "unknown GPU 'h900': choose from t4"),
        ({"utilisation": 0.0}, "must lie in"),
        ({"utilisation": 40.0}, "must lie in"),
        ({"gpus": 0}, "at least 1 GPU"),
    ],
)
def test_nonsense_is_refused(kwargs: dict[str, Any], says: str):
    with pytest.raises(OneblockError, match=says):
        train_run(get_spec("gpt2"), **kwargs)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
@given(st.floats(7, 12))
def test_no_other_split_of_the_same_compute_has_a_lower_loss(law: Law, power: float):
    n = 10**power
    d = law.tokens(n)
    best = law.loss(n, d)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert law.loss(n * factor, d / factor) >= best


def test_the_refitted_law_agrees_with_twenty_to_one_where_it_was_measured():
    for n in (1e9, 10e9, 70e9):
        assert 15 < optimal_tokens(n, BESIROGLU) / n < 30
    assert optimal_tokens(70e9) == 1.4e12  # Chinchilla itself


def test_laws_have_the_published_exponents():
    """Tokens go with compute to the power alpha / (alpha + beta): arXiv:2404.10102 finds 0.487, Hoffmann 0.543."""
    for law, power in ((BESIROGLU, 0.487), (HOFFMANN, 0.543)):
        assert law.alpha / (law.alpha + law.beta) == pytest.approx(power, abs=0.001)


def test_experts_count_as_what_is_active():
    assert plan_model(get_spec("mixtral-8x7b"), 1024).optimal_tokens == 20 * 12_879_925_248
