"""Several tokens guessed, and checked in one pass of the model: the same distribution in fewer passes.

arXiv:2211.17192 and arXiv:2302.01318: a guess drawn from q is kept with probability min(1, p / q), and else replaced by
a draw from what p has more than q. Guesses come from a smaller model, or from the text itself (q is then 1 for the one
token that followed the same words before). Texts are guessed one at a time. Shapes: n guesses, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.infer.generate import Request, Sequences, TokenOutput, chosen_from, context_limit, remaining_tokens
from oneblock.infer.sample import Counts, SamplingParams, distribution, draw, only, process_logits
from oneblock.infer.stop import Detokenizer, Reply
from oneblock.model import Decoder

if TYPE_CHECKING:
    from oneblock.infer.structured_output import GrammarMatchers

LONGEST, SHORTEST = 4, 2  # tokens that must have occurred before for what followed them to be guessed


@dataclass(frozen=True)
class DraftTokens:
    ids: list[int]
    weights: Tensor | None = None  # (n, V): what each was drawn from; None: they are sure


class Drafter(Protocol):
    def propose(self, text: Sequence[int], n: int) -> DraftTokens:
        """Up to n tokens that may follow."""
        ...


@dataclass
class SpeculativeStats:
    """How many guesses there were, and how many were kept."""

    guessed: int = 0
    kept: int = 0

    def __str__(self) -> str:
        return f"{self.kept:,} of {self.guessed:,} guessed tokens kept ({self.kept / max(self.guessed, 1):.0%})"


class NgramDrafter:
    """What followed the last words when the text had them before (prompt lookup)."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}  # some ids -> where what followed them begins, latest first
        self.read = 0

    def propose(self, text: Sequence[int], n: int) -> DraftTokens:
        known = tuple(text)
        for end in range(max(self.read, 1), len(known)):  # the text's own end is not yet followed by anything
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self.after[known[end - size : end]] = end
        self.read = len(known)
        for size in range(min(LONGEST, len(known)), SHORTEST - 1, -1):
            if (start := self.after.get(known[-size:])) is not None:
                return DraftTokens(list(known[start : start + n]))
        return DraftTokens([])


class ModelDrafter:
    """What a smaller model with the same vocabulary would write."""

    def __init__(self, model: Decoder, sampling: SamplingParams, seed: int):
        self.model, self.sampling = model, replace(sampling, logit_bias={})
        self.texts: Sequences | None = None
        self.generator = torch.Generator().manual_seed(seed % 2**63)

    def propose(self, text: Sequence[int], n: int) -> DraftTokens:
        limit = context_limit(self.model.spec)
        n = n if limit is None else max(min(n, limit - len(text)), 0)
        if self.texts is None:
            self.texts = Sequences(self.model, [text], len(text) + n)
        else:
            self.texts.replace(text)
        ids, weights = [], []
        for _ in range(n):
            p = weighed(self.texts.step(), self.sampling, None)
            id = pick(p, self.generator)
            self.texts.append_tokens([id])
            ids.append(id)
            weights.append(p)
        return DraftTokens(ids, torch.stack(weights) if weights else None)


def check_alike(model: Decoder, draft: Decoder) -> None:
    if model.spec.vocab != draft.spec.vocab:
        raise OneblockError(
            f"the draft model has {draft.spec.vocab} words and the model {model.spec.vocab}: give a draft with the "
            f"same tokenizer"
        )


# ------------------------------------------------------------------ checking


def weighed(logits: Tensor, sampling: SamplingParams, counts: Counts | None, allowed: Tensor | None = None) -> Tensor:
    """The distribution (V,) that a token is drawn from; all of it on one token where the choice is greedy.

    `allowed` (1, V): the ids that may be chosen at all.
    """
    logits = process_logits(logits.float().view(1, -1), sampling, counts)
    logits = logits if allowed is None else only(logits, allowed)
    if sampling.greedy:
        return torch.zeros_like(logits[0]).index_fill_(0, logits.argmax(-1), 1.0)
    return distribution(logits, sampling)[0]


def pick(weights: Tensor, generator: torch.Generator) -> int:
    uniform = torch.rand(1, dtype=torch.float64, generator=generator)
    return int(draw(weights[None].cpu(), uniform))


def rejection_sample(p: Tensor, id: int, q: Tensor | None, generator: torch.Generator) -> tuple[int, bool]:
    """The token at one place, and whether it is the guessed one: p (V,) is the model's, q what the guess is from."""
    chance = 1.0 if q is None else float(q[id])
    if torch.rand(1, dtype=torch.float64, generator=generator).item() * chance < float(p[id]):
        return id, True
    left = p.clone() if q is None else (p - q).clamp(min=0)
    if q is None:
        left[id] = 0.0
    return pick(left if left.sum() > 0 else p, generator), False


@dataclass
class Speculation:
    """One text, its drafter, and the state of its draws."""

    texts: Sequences
    request: Request
    drafter: Drafter
    length: int  # guesses at a time
    generator: torch.Generator
    counts: Counts | None
    matchers: GrammarMatchers | None  # of the only row
    stats: SpeculativeStats = field(default_factory=SpeculativeStats)

    def step(self, most: int) -> list[tuple[TokenOutput, bool]]:
        """One pass: the guesses that stood, then one token of the model's own; `most` tokens may come.

        With each whether nothing may follow it. The cache has no more than the row then.
        """
        texts, [row] = self.texts, self.texts.rows
        n = min(self.length, most - 1)
        guess = self.drafter.propose(row, n) if n > 0 and texts.cache.can_rewind(len(row) + n) else DraftTokens([])
        logits = texts.score_draft_tokens(guess.ids)
        if logits.amax().isnan():
            raise OneblockError("the model's logits are not numbers: load it with dtype bfloat16 or float32")
        chosen: list[tuple[TokenOutput, bool]] = []
        for i in range(len(guess.ids) + 1):
            id, kept = self.settle(logits[i], guess, i)
            [event] = chosen_from(logits[i : i + 1], torch.tensor([id], device=logits.device), self.request.logprobs)
            texts.append_tokens([id])
            last = self.matchers is not None and self.matchers.push([id])[0]
            chosen.append((event, last))
            self.stats.kept += kept
            if not kept or last or id in self.request.stop_ids:
                break
        self.stats.guessed += len(guess.ids)
        texts.cache.rewind(len(row) - 1)  # the last of them is the model's own, and not yet fed
        return chosen

    def settle(self, logits: Tensor, guess: DraftTokens, i: int) -> tuple[int, bool]:
        """The token after the first i guesses, and whether it is the next of them."""
        allowed = None if self.matchers is None else self.matchers.allowed()
        p = weighed(logits, self.request.sampling, self.counts, allowed)
        if i == len(guess.ids):
            found = pick(p, self.generator), False
        else:
            found = rejection_sample(
                p, guess.ids[i], None if guess.weights is None else guess.weights[i], self.generator
            )
        if self.counts is not None:
            self.counts.add(torch.tensor([found[0]], device=logits.device))
        return found


@torch.inference_mode()
def speculated(
    texts: Sequences,
    request: Request,
    detokenizer: Detokenizer | None,
    drafter: Drafter,
    length: int,
    stats: SpeculativeStats,
) -> Iterator[TokenOutput]:
    """`generate.events` for one text."""
    most = remaining_tokens(texts.model.spec, texts.rows[0], request.max_tokens)
    reply = Reply(detokenizer, most, request.stop_ids, request.stop)
    seed = request.seeds[0] if request.seeds else secrets.randbits(63)
    counts = Counts(texts.rows, texts.model.spec.vocab, texts.model.device) if request.sampling.counts else None
    generator = torch.Generator().manual_seed(seed % 2**63)
    matchers = request.grammar.start(texts.rows, request.stop_ids) if request.grammar is not None else None
    speculation = Speculation(texts, request, drafter, length, generator, counts, matchers, stats)
    while reply.finish is None:
        for event, last in speculation.step(most):
            most -= 1
            yield replace(event, row=0, text=reply.push(event.id, last), finish=reply.finish)
            if reply.finish is not None:
                return
