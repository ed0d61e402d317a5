"""Speculative decoding: draft tokens verified in one forward pass, with an unchanged output distribution.

Rejection sampling (arXiv:2211.17192, arXiv:2302.01318): a draft token drawn from q is accepted with probability
min(1, p / q), else replaced by a draw from max(p - q, 0). Drafts come from a smaller model, or from n-grams of the
sequence itself (prompt lookup; q is then 1 at the draft token). One sequence at a time.

Shapes: n draft tokens, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from oneblock.infer import generate as decoding
from oneblock.infer.generate import Request, Sequences, TokenOutput
from oneblock.infer.options import SamplingParams
from oneblock.infer.sample import TokenCounts, compute_probabilities, draw_tokens, process_logits
from oneblock.infer.stop import Reply
from oneblock.model import Decoder

MAX_NGRAM, MIN_NGRAM = 4, 2


@dataclass(frozen=True)
class DraftTokens:
    ids: list[int]
    probabilities: Tensor | None = None  # (n, V): the distribution of each; None: one-hot


class Drafter(Protocol):
    def propose(self, sequence: Sequence[int], n: int) -> DraftTokens:
        """Up to n tokens that may follow the sequence."""
        ...


@dataclass
class SpeculativeStats:
    """Counts of draft tokens and of those accepted."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / max(self.drafted, 1)

    def __str__(self) -> str:
        return f"{self.accepted:,} of {self.drafted:,} draft tokens accepted ({self.acceptance_rate:.0%})"


class NgramDrafter:
    """Proposes the tokens that followed the latest earlier occurrence of the sequence's last n-gram."""

    def __init__(self) -> None:
        self._continuations: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence
        self._indexed = 0

    def propose(self, sequence: Sequence[int], n: int) -> DraftTokens:
        ids = tuple(sequence)
        for end in range(max(self._indexed, 1), len(ids)):  # nothing follows the last n-gram yet
            for size in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._continuations[ids[end - size : end]] = end
        self._indexed = len(ids)
        for size in range(min(MAX_NGRAM, len(ids)), MIN_NGRAM - 1, -1):
            if (start := self._continuations.get(ids[-size:])) is not None:
                return DraftTokens(list(ids[start : start + n]))
        return DraftTokens([])


class ModelDrafter:
    """Proposes samples of a smaller model with the same vocabulary."""

    def __init__(self, model: Decoder, sampling: SamplingParams, seed: int):
        self.model, self.sampling = model, replace(sampling, logit_bias={})
        self.sequences: Sequences | None = None
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, sequence: Sequence[int], n: int) -> DraftTokens:
        limit = decoding.context_limit(self.model.spec)
        n = n if limit is None else max(min(n, limit - len(sequence)), 0)
        if self.sequences is None:
            self.sequences = Sequences(self.model, [sequence], len(sequence) + n)
        else:
            self.sequences.replace_prompt(sequence)
        ids, probabilities = [], []
        for _ in range(n):
            q = compute_target_distribution(self.sequences.step(), self.sampling, None)
            id = draw_token(q, self.generator)
            self.sequences.append_tokens([id])
            ids.append(id)
            probabilities.append(q)
        return DraftTokens(ids, torch.stack(probabilities) if probabilities else None)


# ------------------------------------------------------------------ verification


def compute_target_distribution(
    logits: Tensor, sampling: SamplingParams, counts: TokenCounts | None, allowed: Tensor | None = None
) -> Tensor:
    """The distribution (V,) that a token is drawn from; one-hot where sampling is greedy. `allowed`: (1, V)."""
    logits = process_logits(logits.float().view(1, -1), sampling, counts, allowed)
    if sampling.is_greedy:
        return torch.zeros_like(logits[0]).index_fill_(0, logits.argmax(-1), 1.0)
    return compute_probabilities(logits, sampling)[0]


def draw_token(weights: Tensor, generator: torch.Generator) -> int:
    uniform = torch.rand(1, dtype=torch.float64, generator=generator)
    return int(draw_tokens(weights[None].cpu(), uniform))


def rejection_sample(p: Tensor, id: int, q: Tensor | None, generator: torch.Generator) -> tuple[int, bool]:
    """The token at one position and whether it is the draft token; p, q (V,): target and draft distribution."""
    draft_probability = 1.0 if q is None else float(q[id])
    if torch.rand(1, dtype=torch.float64, generator=generator).item() * draft_probability < float(p[id]):
        return id, True
    residual = p.clone() if q is None else (p - q).clamp(min=0)
    if q is None:
        residual[id] = 0.0
    return draw_token(residual if residual.sum() > 0 else p, generator), False


class SpeculativeDecoder:
    """One sequence, its reply, its drafter and its sampling state."""

    def __init__(
        self, sequences: Sequences, request: Request, reply: Reply, draft_model: Decoder | None, stats: SpeculativeStats
    ):
        """Without a draft model the drafts are n-grams of the sequence."""
        self.sequences, self.request, self.reply, self.stats = sequences, request, reply, stats
        model, draft_seed = sequences.model, ((request.seeds or (0,))[0] + 1) % 2**63  # independent of the own draws
        self.drafter: Drafter = NgramDrafter()
        if draft_model is not None:
            self.drafter = ModelDrafter(draft_model, request.sampling, draft_seed)
        needs_counts = request.sampling.needs_counts
        self.counts = TokenCounts(sequences.rows, model.spec.vocab, model.device) if needs_counts else None
        self.generator = torch.Generator().manual_seed(request.seeds[0] if request.seeds else secrets.randbits(63))

    @torch.inference_mode()
    def generate_tokens(self, num_speculative_tokens: int) -> Iterator[TokenOutput]:
        """`generate.generate_tokens` with draft tokens, for one sequence."""
        while self.reply.finish_reason is None:
            yield from self.step(min(num_speculative_tokens, self.reply.remaining_tokens - 1))

    def step(self, n: int) -> list[TokenOutput]:
        """One forward pass: those of n draft tokens that are accepted, and one token of the model's own.

        Afterwards the cache holds no rejected token.
        """
        sequences, [row] = self.sequences, self.sequences.rows
        can_reject = n > 0 and sequences.cache.can_rewind(len(row) + n)
        draft = self.drafter.propose(row, n) if can_reject else DraftTokens([])
        logits = decoding.check_logits(sequences.score_draft_tokens(draft.ids))
        outputs: list[TokenOutput] = []
        for i in range(len(draft.ids) + 1):
            id, accepted = self.sample_position(logits[i], draft, i)
            ids = torch.tensor([id], device=logits.device)
            [output] = decoding.build_token_outputs(logits[i : i + 1], ids, self.request.top_logprobs)
            sequences.append_tokens([id])
            text = self.reply.push(id)
            outputs.append(replace(output, text=text, finish_reason=self.reply.finish_reason))
            self.stats.accepted += accepted
            if not accepted or self.reply.finish_reason is not None:
                break
        self.stats.drafted += len(draft.ids)
        sequences.cache.rewind(len(row) - 1)  # the last token was sampled here and is not fed yet
        return outputs

    def sample_position(self, logits: Tensor, draft: DraftTokens, i: int) -> tuple[int, bool]:
        """The token after i draft tokens, and whether it is the next draft token."""
        p = compute_target_distribution(
            logits, self.request.sampling, self.counts, decoding.allowed_tokens([self.reply])
        )
        if i == len(draft.ids):
            id, accepted = draw_token(p, self.generator), False
        else:
            q = None if draft.probabilities is None else draft.probabilities[i]
            id, accepted = rejection_sample(p, draft.ids[i], q, self.generator)
        if self.counts is not None:
            self.counts.add(torch.tensor([id], device=logits.device))
        return id, accepted
