"""Sampling against transformers' logits processors, against plain Python, and by properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneblock.errors import OneblockError
from oneblock.infer.options import SamplingParams
from oneblock.infer.sample import (
    Sampler,
    TokenCounts,
    compute_logprobs,
    compute_probabilities,
    compute_top_logprobs,
    draw_tokens,
    process_logits,
    sample_tokens,
)

PROBABLE = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10_000)
vocabularies = st.sampled_from([2, 5, 50, 700])  # above and below TOP_P_CANDIDATES


def random_logits(seed: int, vocab: int, rows: int = 2, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def nonzero_ids(probabilities: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in probabilities]


# ------------------------------------------------------------------ against transformers


def reference(logits: torch.Tensor, sampling: SamplingParams, prompts: list[list[int]] | None = None) -> torch.Tensor:
    """transformers' warpers in its own order; rows have prompts of one length."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.tensor(prompts) if prompts else torch.zeros(len(logits), 0, dtype=torch.long)
    chain = []
    if sampling.repetition_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature != 1:
        chain.append(processors.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(processors.TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        chain.append(processors.MinPLogitsWarper(float(sampling.min_p)))
    for process in chain:
        logits = process(ids, logits)
    return logits.softmax(-1)


@PROBABLE
@given(
    seed=seeds,
    vocab=vocabularies,
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    k=st.sampled_from([0, 1, 2, 7, 10_000]),
    p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    m=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition=st.sampled_from([0.6, 1.0, 1.7]),
)
def test_probabilities_equal_transformers(seed, vocab, temperature, k, p, m, repetition):
    logits = random_logits(seed, vocab)
    prompts = torch.randint(0, vocab, (2, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    sampling = SamplingParams(temperature, k, p, m, repetition_penalty=repetition)
    ours = compute_probabilities(process_logits(logits, sampling, TokenCounts(prompts, vocab)), sampling)
    torch.testing.assert_close(ours, reference(logits, sampling, prompts), atol=1e-5, rtol=1e-4)


def test_repetition_penalty_counts_prompt_and_reply():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    sampling = SamplingParams(repetition_penalty=2.0)
    counts = TokenCounts([[0, 1, 1]], 5)
    counts.add(torch.tensor([2]))
    assert process_logits(logits, sampling, counts).tolist() == [[1.0, -4.0, 1.0, -2.0, 1.0]]


def test_presence_and_frequency_penalties_count_the_reply_only():
    """OpenAI's definition: logits[i] -= count[i] * frequency + (count[i] > 0) * presence."""
    logits = torch.zeros(1, 4)
    counts = TokenCounts([[3, 3]], 4)
    for token in (0, 1, 1):
        counts.add(torch.tensor([token]))
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert process_logits(logits, sampling, counts).tolist() == [[-0.75, -1.0, 0.0, 0.0]]


def test_logit_bias_adds_and_bans():
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    sampling = SamplingParams(temperature=0, logit_bias={2: -math.inf, 1: 0.5})
    assert process_logits(logits, sampling, None).tolist() == [[1.0, 2.5, -math.inf], [3.0, 2.5, -math.inf]]
    assert sample_tokens(logits, sampling, None, None).tolist() == [1, 0]


# ------------------------------------------------------------------ definitions, in plain Python


def plain_top_p(probabilities: list[float], p: float) -> set[int]:
    kept, mass = set(), 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if mass >= p:
            break
        kept.add(i)
        mass += probabilities[i]
    return kept


@PROBABLE
@given(seed=seeds, vocab=vocabularies, p=st.floats(0.01, 0.99), scale=st.sampled_from([0.01, 1.0, 6.0]))
def test_top_p_keeps_the_smallest_set_with_the_mass(seed, vocab, p, scale):
    logits = random_logits(seed, vocab, scale=scale)
    full = logits.softmax(-1)
    cut = compute_probabilities(logits, SamplingParams(top_p=p))
    for before, row, kept in zip(full.double(), cut, nonzero_ids(cut), strict=True):
        expected = plain_top_p(before.tolist(), p)
        mass = before[sorted(kept)].sum().item()
        assert kept == expected or abs(mass - p) < 1e-5, "only rounding at the edge may differ"
        assert row.sum().item() == pytest.approx(1, abs=1e-5)
        assert before.argmax().item() in kept


@PROBABLE
@given(seed=seeds, vocab=vocabularies, k=st.integers(1, 60))
def test_top_k_keeps_k(seed, vocab, k):
    logits = random_logits(seed, vocab)
    for row, kept in zip(logits, nonzero_ids(compute_probabilities(logits, SamplingParams(top_k=k))), strict=True):
        assert kept == set(row.topk(min(k, vocab)).indices.tolist())


def test_top_k_keeps_ties():
    kept = nonzero_ids(compute_probabilities(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), SamplingParams(top_k=2)))
    assert kept == [{0, 1, 2}]


@PROBABLE
@given(seed=seeds, vocab=vocabularies, m=st.floats(0.001, 1))
def test_min_p_is_relative_to_the_likeliest(seed, vocab, m):
    logits = random_logits(seed, vocab)
    full = logits.softmax(-1)
    for row, kept in zip(full, nonzero_ids(compute_probabilities(logits, SamplingParams(min_p=m))), strict=True):
        surely = set((row > m * row.max() * 1.0001).nonzero()[:, 0].tolist())
        at_most = set((row > m * row.max() * 0.9999).nonzero()[:, 0].tolist())
        assert surely <= kept <= at_most
        assert row.argmax().item() in kept


@PROBABLE
@given(seed=seeds, k=st.sampled_from([0, 3]), p=st.sampled_from([0.6, 1.0]), m=st.sampled_from([0.0, 0.1]))
def test_permuted_vocabulary_gives_permuted_probabilities(seed, k, p, m):
    logits = random_logits(seed, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    sampling = SamplingParams(0.8, k, p, m)
    permuted = compute_probabilities(logits[:, order], sampling)
    torch.testing.assert_close(permuted, compute_probabilities(logits, sampling)[:, order], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------ draws


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    possible = expected > 0
    assert observed[~possible].sum() == 0, "drew a token of probability 0"
    return (((observed - expected)[possible] ** 2) / expected[possible]).sum().item()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(0.5),
        SamplingParams(1.5, top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
    ],
    ids=str,
)
def test_draws_match_the_distribution_by_chi_square(sampling):
    n, vocab = 20_000, 8
    logits = random_logits(3, vocab, rows=1, scale=1.0)
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    drawn = sample_tokens(logits.expand(n, -1), sampling, None, uniform)
    expected = n * compute_probabilities(logits, sampling)[0]
    # 7 degrees of freedom: 40.5 is exceeded once in a million
    assert chi_square(drawn.bincount(minlength=vocab).float(), expected) < 40.5


def test_sampler_draws_match_the_distribution_by_chi_square():
    """Thousands of draws from one row's own generator."""
    logits = random_logits(5, 6, rows=1, scale=1.0)
    sampler = Sampler(SamplingParams(), [11], [[0]], 6)
    drawn = torch.cat([sampler.next(logits) for _ in range(4000)])
    expected = 4000 * logits.softmax(-1)[0]
    assert chi_square(drawn.bincount(minlength=6).float(), expected) < 35.9  # 5 degrees, once in a million


@PROBABLE
@given(seed=seeds, vocab=vocabularies, u=st.sampled_from([0.0, 1e-17, 0.3, 0.999999999999, 1 - 2**-53]))
def test_drawn_tokens_have_nonzero_weight(seed, vocab, u):
    weights = random_logits(seed, vocab).softmax(-1)
    weights[:, torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[: vocab // 2]] = 0
    ids = draw_tokens(weights, torch.full((2,), u, dtype=torch.float64))
    assert (weights.gather(-1, ids[:, None]) > 0).all()


def test_samples_do_not_depend_on_the_batch():
    logits = random_logits(6, 40, rows=3)
    sampling = SamplingParams(0.9, presence_penalty=0.3)
    together = Sampler(sampling, [1, 2, 3], [[0], [1], [2]], 40)
    batch = torch.stack([together.next(logits) for _ in range(20)])
    for row in range(3):
        single = Sampler(sampling, [row + 1], [[row]], 40)
        alone = torch.cat([single.next(logits[row : row + 1]) for _ in range(20)])
        assert alone.tolist() == batch[:, row].tolist()


def test_selected_sequences_keep_generator_and_counts():
    logits = random_logits(7, 12, rows=3, scale=1.0)
    sampling = SamplingParams(frequency_penalty=1.0)
    full, fewer = (Sampler(sampling, [1, 2, 3], [[0], [1], [2]], 12) for _ in range(2))
    first = full.next(logits)
    assert torch.equal(fewer.next(logits), first)
    fewer.select_sequences([2, 0])
    for _ in range(10):
        assert fewer.next(logits[[2, 0]]).tolist() == full.next(logits)[[2, 0]].tolist()


def test_greedy_is_argmax_without_random_numbers():
    logits = random_logits(8, 100)
    sampler = Sampler(SamplingParams(temperature=0, top_k=3, top_p=0.1), [1, 2], [[0], [0]], 100)
    assert sampler.next(logits).tolist() == logits.argmax(-1).tolist()
    assert sampler.next(logits.bfloat16()).tolist() == logits.bfloat16().float().argmax(-1).tolist()


def test_tiny_temperature_equals_greedy():
    logits = random_logits(9, 100, scale=50.0)
    for temperature in (1e-38, 1e-300):
        probabilities = compute_probabilities(logits, SamplingParams(temperature=temperature))
        assert probabilities.argmax(-1).tolist() == logits.argmax(-1).tolist()
        assert probabilities.amax(-1).tolist() == [1.0] * len(logits)


def test_extreme_values_in_range_give_finite_probabilities():
    logits = random_logits(9, 100, scale=50.0)
    counts = TokenCounts([[1], [2]], 100)
    counts.add(torch.tensor([3, 4]))
    for params in (
        SamplingParams(temperature=1e6, logit_bias={3: 1e30, 4: -math.inf}),
        SamplingParams(temperature=1e-300, top_p=1e-300, min_p=1e-300, top_k=10**30),
        SamplingParams(repetition_penalty=1e-6, presence_penalty=1e6, frequency_penalty=-1e6),
        SamplingParams(repetition_penalty=1e6, logit_bias={1: -1e308}),
    ):
        probabilities = compute_probabilities(process_logits(logits, params, counts), params)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))


# ------------------------------------------------------------------ log-probabilities


def test_logprobs_equal_the_full_log_softmax():
    logits = random_logits(10, 20)
    ids = torch.tensor([3, 19])
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(
        compute_logprobs(logits, ids).double(), expected[torch.arange(2), ids], atol=1e-5, rtol=0
    )
    top, values = compute_top_logprobs(logits, 4)
    assert top.tolist() == expected.topk(4).indices.tolist()
    torch.testing.assert_close(values.double(), expected.topk(4).values, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ wrong values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", math.inf),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {3: 1e308}),
        ("logit_bias", {3: "high"}),
        ("logit_bias", [3]),
        ("temperature", None),
        ("temperature", [0.5]),
        ("temperature", 1e7),
        ("top_k", True),
        ("top_p", math.nan),
        ("repetition_penalty", 1e-300),
        ("frequency_penalty", 1e308),
    ],
)
def test_out_of_range_values_are_one_line_errors(field, value):
    with pytest.raises(OneblockError, match=field) as error:
        SamplingParams(**{field: value})
    assert "\n" not in str(error.value)
