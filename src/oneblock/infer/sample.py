"""Choosing the next token: pure functions on logits.

Shapes: B rows of a batch, V vocabulary, N tokens of a text. Computed in fp32 whatever the model's dtype.

The order is that of transformers: penalties and bias, temperature, top-k, top-p, min-p. Each cut works on what the
one before it left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict

import torch
from torch import Tensor

from oneblock.errors import OneblockError

NEAREST = 512  # top-p sorts this many candidates first; they nearly always hold the mass, and sorting V takes ms


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments; None: leave it to the model's own defaults."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen. The defaults change nothing: a draw from the model's own distribution."""

    temperature: float = 1.0  # divides the logits; 0: always the most likely token
    top_k: int = 0  # keep this many of the most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens with this much of the probability
    min_p: float = 0.0  # keep tokens at least this likely, relative to the most likely one
    repetition_penalty: float = 1.0  # shrink the logits of tokens in the prompt or the reply (arXiv:1909.05858)
    presence_penalty: float = 0.0  # subtract from the logits of tokens in the reply
    frequency_penalty: float = 0.0  # subtract this, times how often the reply has the token
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added to the logits of these ids

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "logit_bias" and not _is_number(getattr(self, f.name)):
                raise OneblockError(f"{f.name} is {getattr(self, f.name)!r}: it must be a finite number")
        _require(self.temperature >= 0, f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        _require(self.top_k >= 0 and int(self.top_k) == self.top_k, f"top_k is {self.top_k}: 0 keeps all, 1 is greedy")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}: it must be above 0 and at most 1 (1 keeps all)")
        _require(0 <= self.min_p <= 1, f"min_p is {self.min_p}: it must be between 0 (keeps all) and 1")
        _require(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}: it must be above 0")
        for token, bias in self.logit_bias.items():
            _require(not math.isnan(bias) and bias < math.inf, f"logit_bias of {token} is {bias}: give a number")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens the text already has."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OneblockError(message)


class Counts:
    """How often each token occurs in each row: in its prompt (yes or no) and in its reply."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab: int, device: torch.device | str = "cpu"):
        self.prompt = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
        self.reply = torch.zeros(len(prompts), vocab, dtype=torch.int32, device=device)
        for row, ids in enumerate(prompts):
            known = torch.tensor([i for i in ids if i < vocab], dtype=torch.long, device=device)
            self.prompt[row, known] = True  # input rows past the vocabulary are never predicted

    def add(self, ids: Tensor) -> None:
        """Count one more token (B,) of each row's reply."""
        self.reply.scatter_add_(1, ids[:, None], torch.ones_like(ids[:, None], dtype=torch.int32))

    def select_sequences(self, rows: Sequence[int]) -> None:
        self.prompt, self.reply = self.prompt[list(rows)], self.reply[list(rows)]


def sample_tokens(
    logits: Tensor,
    sampling: SamplingParams,
    counts: Counts | None,
    uniform: Tensor | None,
    allowed: Tensor | None = None,
) -> Tensor:
    """The next token of each row: logits (B, V) -> ids (B,). `uniform` (B,) in [0, 1) is the generator of each row.

    `allowed` (B, V): the ids that may be chosen at all.
    """
    logits = process_logits(logits.float(), sampling, counts)
    if allowed is not None:
        logits = only(logits, allowed)
    if sampling.greedy:
        return logits.argmax(-1)
    assert uniform is not None, "a draw needs generator"
    return draw(distribution(logits, sampling), uniform)


def only(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits (B, V) with what is not allowed at -inf."""
    logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
    if bool(logits.amax(-1).isneginf().any()):
        raise OneblockError("no token may follow: what the reply must be, the vocabulary and logit_bias leave none")
    return logits


def process_logits(logits: Tensor, sampling: SamplingParams, counts: Counts | None) -> Tensor:
    """Logits (B, V) after bias and penalties."""
    if counts is not None and sampling.counts:
        logits = penalised(logits, sampling, counts)
    return biased(logits, sampling.logit_bias) if sampling.logit_bias else logits


def distribution(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The probabilities (B, V) that a token is drawn from; adjusted logits go in."""
    if sampling.temperature != 1:  # relative to the largest: a tiny temperature must not overflow
        logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    logits = top_k(logits, int(sampling.top_k)) if sampling.top_k else logits
    probabilities = logits.softmax(-1)
    probabilities = top_p(probabilities, sampling.top_p) if sampling.top_p < 1 else probabilities
    probabilities = min_p(probabilities, sampling.min_p) if sampling.min_p else probabilities
    return probabilities / probabilities.sum(-1, keepdim=True)


def penalised(logits: Tensor, sampling: SamplingParams, counts: Counts) -> Tensor:
    repetition = sampling.repetition_penalty
    if repetition != 1:
        seen = counts.prompt | (counts.reply > 0)
        logits = torch.where(seen, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
    if sampling.frequency_penalty:
        logits = logits - sampling.frequency_penalty * counts.reply
    return logits - sampling.presence_penalty * (counts.reply > 0) if sampling.presence_penalty else logits


def biased(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    ids = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(-1, ids, logits.new_tensor(list(bias.values())).expand(len(logits), -1))


def top_k(logits: Tensor, k: int) -> Tensor:
    """Logits with all but the k largest at -inf; what ties with the k-th stays."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def top_p(probabilities: Tensor, p: float) -> Tensor:
    """The smallest set of likely tokens whose probabilities reach p, never empty; not normalised again."""
    vocab = probabilities.shape[-1]
    largest, ids = probabilities.topk(min(NEAREST, vocab))
    if largest.shape[-1] < vocab and not bool((largest.sum(-1) > p).all()):
        largest, ids = probabilities.sort(descending=True)  # flat: a large share of the vocabulary is needed
    before = largest.cumsum(-1) - largest  # the mass of what is likelier
    kept = largest.masked_fill(before >= p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, ids, kept)


def min_p(probabilities: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest; not normalised again (arXiv:2407.01082)."""
    return probabilities.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), 0.0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One id per row in proportion to weights (B, V), by the inverse of their running sum at `uniform` (B,)."""
    running = weights.cumsum(-1, dtype=torch.float64)  # fp32 would lose tokens rarer than 1e-7
    total = running[:, -1:].contiguous()
    ids = torch.searchsorted(running, uniform.to(running)[:, None] * total, right=True)
    # Rounding may carry u * total to the total itself: then the last token that has any weight.
    last = torch.searchsorted(running, total)
    return torch.minimum(ids, last)[:, 0]


class Sampler:
    """Sampling with a state for each row: its generator, and which tokens it has.

    Every row draws from its own seed, so that what it draws does not depend on the batch it is in.
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
        self._generators = [] if sampling.greedy else [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self._counts = Counts(prompts, vocab, device) if sampling.counts else None

    def next(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The next token of each row: logits (B, V) -> ids (B,), of those `allowed` (B, V)."""
        generator = [
            torch.rand(1, dtype=torch.float64, generator=g) for g in self._generators
        ]  # on the CPU: the same everywhere
        ids = sample_tokens(logits, self.sampling, self._counts, torch.cat(generator) if generator else None, allowed)
        if self._counts is not None:
            self._counts.add(ids)
        return ids

    def select_sequences(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._generators = [self._generators[i] for i in rows] if self._generators else []
        if self._counts is not None:
            self._counts.select_sequences(rows)


def logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (B,) of ids (B,) in the model's own distribution: before penalties, temperature and cuts."""
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # on CPUs faster than logsumexp


def top_logprobs(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n likeliest ids of each row and their log-probabilities, likeliest first: (B, n) each."""
    values, ids = logits.float().log_softmax(-1).topk(min(n, logits.shape[-1]))
    return ids, values
