"""Sampling: pure functions from logits to the next token, and the state of a batch's random generators and counts.

Shapes: B sequences, V vocabulary. Computed in fp32 for every dtype of the model. The order is that of transformers:
penalties and bias, temperature, top-k, top-p, min-p; each filter sees the output of the one before.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.infer.options import SamplingParams

TOP_P_CANDIDATES = 512  # sorted first: they nearly always hold the top-p mass, and sorting V tokens takes milliseconds
MIN_TEMPERATURE = 1e-30  # smaller ones underflow in fp32, and the distribution is the same


class TokenCounts:
    """Which tokens each prompt contains, and how often each occurs in the reply: (B, V) each."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab: int, device: torch.device | str = "cpu"):
        self.prompt = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
        self.reply = torch.zeros(len(prompts), vocab, dtype=torch.int32, device=device)
        for row, ids in enumerate(prompts):
            known = torch.tensor([i for i in ids if i < vocab], dtype=torch.long, device=device)
            self.prompt[row, known] = True  # extra rows of the input embedding are never predicted

    def add(self, ids: Tensor) -> None:
        """Count one more token (B,) of each reply."""
        self.reply.scatter_add_(1, ids[:, None], torch.ones_like(ids[:, None], dtype=torch.int32))

    def select_sequences(self, rows: Sequence[int]) -> None:
        self.prompt, self.reply = self.prompt[list(rows)], self.reply[list(rows)]


def sample_tokens(
    logits: Tensor,
    sampling: SamplingParams,
    counts: TokenCounts | None,
    uniform: Tensor | None,
    allowed: Tensor | None = None,
) -> Tensor:
    """The next token of each sequence: logits (B, V) -> ids (B,).

    `uniform` (B,) in [0, 1): one random number per sequence; None where sampling is greedy. `allowed` (B, V): the mask
    of structured output.
    """
    logits = process_logits(logits.float(), sampling, counts, allowed)
    if sampling.is_greedy:
        return logits.argmax(-1)
    assert uniform is not None, "sampling needs random numbers"
    return draw_tokens(compute_probabilities(logits, sampling), uniform)


def process_logits(
    logits: Tensor, sampling: SamplingParams, counts: TokenCounts | None, allowed: Tensor | None = None
) -> Tensor:
    """Logits (B, V) after penalties and bias, with ids outside `allowed` at -inf."""
    if counts is not None and sampling.needs_counts:
        logits = apply_penalties(logits, sampling, counts)
    if sampling.logit_bias:
        logits = apply_logit_bias(logits, sampling.logit_bias)
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        if bool(logits.amax(-1).isneginf().any()):
            raise OneblockError("no token may follow: structured output, vocabulary and logit_bias exclude every token")
    return logits


def apply_penalties(logits: Tensor, sampling: SamplingParams, counts: TokenCounts) -> Tensor:
    repetition = sampling.repetition_penalty
    if repetition != 1:
        present = counts.prompt | (counts.reply > 0)
        logits = torch.where(present, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
    if sampling.frequency_penalty:
        logits = logits - sampling.frequency_penalty * counts.reply
    return logits - sampling.presence_penalty * (counts.reply > 0) if sampling.presence_penalty else logits


def apply_logit_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    ids = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(-1, ids, logits.new_tensor(list(bias.values())).expand(len(logits), -1))


def compute_probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution (B, V) that a token is drawn from, given processed logits."""
    if sampling.temperature != 1:  # relative to the largest logit: a tiny temperature must not overflow
        logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, MIN_TEMPERATURE)
    logits = apply_top_k(logits, sampling.top_k) if sampling.top_k else logits
    probabilities = logits.softmax(-1)
    probabilities = apply_top_p(probabilities, sampling.top_p) if sampling.top_p < 1 else probabilities
    probabilities = apply_min_p(probabilities, sampling.min_p) if sampling.min_p else probabilities
    return probabilities / probabilities.sum(-1, keepdim=True)


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits with all but the k largest at -inf; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def apply_top_p(probabilities: Tensor, p: float) -> Tensor:
    """The smallest set of most likely tokens whose probabilities reach p, never empty; not renormalised."""
    vocab = probabilities.shape[-1]
    largest, ids = probabilities.topk(min(TOP_P_CANDIDATES, vocab))
    if largest.shape[-1] < vocab and not bool((largest.sum(-1) > p).all()):
        largest, ids = probabilities.sort(descending=True)  # a flat distribution: many tokens are needed
    mass_before = largest.cumsum(-1) - largest  # of the more likely tokens
    kept = largest.masked_fill((mass_before >= p) & (mass_before > 0), 0.0)  # a tiny p rounds to 0
    return torch.zeros_like(probabilities).scatter(-1, ids, kept)


def apply_min_p(probabilities: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the most likely one; not renormalised (arXiv:2407.01082)."""
    return probabilities.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), 0.0)


def draw_tokens(weights: Tensor, uniform: Tensor) -> Tensor:
    """One id per row with probability proportional to weights (B, V): the inverse CDF at `uniform` (B,)."""
    cdf = weights.cumsum(-1, dtype=torch.float64)  # fp32 would lose tokens rarer than 1e-7
    total = cdf[:, -1:].contiguous()
    ids = torch.searchsorted(cdf, uniform.to(cdf)[:, None] * total, right=True)
    # uniform * total may round to the total: take the last token with any weight then.
    last = torch.searchsorted(cdf, total)
    return torch.minimum(ids, last)[:, 0]


class Sampler:
    """Sampling with per-sequence state: a random generator each, and token counts.

    Every sequence has its own seed (random where none are given), so its samples do not depend on the batch it is in.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]],
        vocab: int,
        device: torch.device | str = "cpu",
    ):
        self.sampling = sampling
        seeds = () if sampling.is_greedy else seeds or [secrets.randbits(63) for _ in prompts]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._counts = TokenCounts(prompts, vocab, device) if sampling.needs_counts else None

    def next(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The next token of each sequence: logits (B, V) -> ids (B,) within `allowed` (B, V)."""
        draws = [torch.rand(1, dtype=torch.float64, generator=g) for g in self._generators]  # CPU: same on every device
        ids = sample_tokens(logits, self.sampling, self._counts, torch.cat(draws) if draws else None, allowed)
        if self._counts is not None:
            self._counts.add(ids)
        return ids

    def select_sequences(self, rows: Sequence[int]) -> None:
        """Keep these rows and drop the others."""
        self._generators = [self._generators[i] for i in rows] if self._generators else []
        if self._counts is not None:
            self._counts.select_sequences(rows)


def compute_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Logprobs (B,) of ids (B,) in the model's own distribution: before penalties, temperature and filters."""
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # on CPUs faster than logsumexp


def compute_top_logprobs(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n most likely ids of each sequence and their logprobs, in descending order: (B, n) each."""
    values, ids = logits.float().log_softmax(-1).topk(min(n, logits.shape[-1]))
    return ids, values
