"""Continuing texts, one token at a time.

There is no prefill phase and no decode phase: every pass feeds the tokens that are not yet in the cache (all of a
prompt, or the one token chosen last) and looks at the logits of the last column only.

Shapes: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.errors import OneblockError
from oneblock.infer.cache import KVCache
from oneblock.infer.sample import Sampler, SamplingParams, logprobs, top_logprobs
from oneblock.infer.stop import Detokenizer, Finish, Reply
from oneblock.model import Decoder

if TYPE_CHECKING:
    from oneblock.infer.structured_output import CompiledGrammar
    from oneblock.kernels.compiled_step import Compiled


CHUNK = 4096  # tokens, of all rows, that a prompt is read by: more at once need more memory and are no faster


@dataclass(frozen=True)
class Request:
    """What is asked for, of every prompt of a batch."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None  # None: as many as the context holds
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()  # one for each prompt; none: drawn anew each time
    logprobs: int | None = None  # also the log-probability of each token, and of this many of the likeliest
    grammar: CompiledGrammar | None = None  # what every reply must keep to

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OneblockError(f"max_tokens is {self.max_tokens}: ask for at least 1")


@dataclass(frozen=True)
class TokenOutput:
    """One more token of one row."""

    row: int
    id: int
    text: str = ""  # what may be shown now; a token may end no character, and several may be shown at once
    finish: Finish | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), likeliest first


class Sequences:
    """Texts that grow together: rows of one batch with one cache. Shorter prompts are padded on the left."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        compiled: Compiled | None = None,
        coded: bool = False,
    ):
        """`coded`: keys and values in 8 bits."""
        self.model, self.capacity, self.compiled, self.coded = model, capacity, compiled, coded
        self.rows = [list(prompt) for prompt in prompts]
        longest = max(map(len, self.rows))
        self.pads = [longest - len(row) for row in self.rows]
        self._steps = longrope_contexts(model.spec)
        self._whole = any(isinstance(scaling(layer), s.LongRope | s.DynamicNTK) for layer in model.spec.pattern)
        self.reset()

    def reset(self) -> None:
        """Begin with an empty cache: everything is read again."""
        model = self.model
        self.cache = KVCache(model.spec, len(self.rows), self.capacity, model.dtype, model.device, self.coded)

    def step(self) -> Tensor:
        """Feed what the cache does not have yet; the logits after the last token of every row, (B, V)."""
        start, device = self.cache.length, self.model.device
        ids = [[0] * (pad - start) + row[max(start - pad, 0) :] for row, pad in zip(self.rows, self.pads, strict=True)]
        fed, positions = torch.tensor(ids, device=device), None
        if any(self.pads):
            columns = torch.arange(start, start + len(ids[0]), device=device)
            positions = columns - torch.tensor(self.pads, device=device)[:, None]
        if self.compiled is not None and start and len(ids[0]) == 1:
            return self.compiled(fed, positions, self.cache)
        return self.model.logits(self._hidden(fed, positions)[:, -1])

    def _hidden(self, fed: Tensor, positions: Tensor | None = None, last: int = 1) -> Tensor:
        """The stream of the last columns of what is fed, (B, last, dim), read chunk by chunk where it is long."""
        length, chunk = fed.shape[1], max(CHUNK // len(fed), last)
        if self._whole or length <= chunk:
            return self.model.hidden_states(fed, positions=positions, cache=self.cache, last=last)
        sizes = [length % chunk or chunk, *[chunk] * ((length - 1) // chunk)]
        places = [None] * len(sizes) if positions is None else positions.split(sizes, 1)
        *early, (ids, at) = zip(fed.split(sizes, 1), places, strict=True)
        for ids_before, at_before in early:
            self.model.hidden_states(ids_before, positions=at_before, cache=self.cache, last=1)
        return self.model.hidden_states(ids, positions=at, cache=self.cache, last=last)

    def score_draft_tokens(self, guesses: Sequence[int]) -> Tensor:
        """Of the only row: feed what the cache lacks and guesses; the logits after its last token and each, (n, V).

        The cache has the guesses then, the row does not: rewind what did not stand.
        """
        [row] = self.rows
        if not guesses:
            return self.step()
        fed = torch.tensor([row[self.cache.length :] + list(guesses)], device=self.model.device)
        return self.model.logits(self._hidden(fed, last=len(guesses) + 1)[0])

    def append_tokens(self, ids: Sequence[int]) -> None:
        for row, id in zip(self.rows, ids, strict=True):
            row.append(id)
        # LongRoPE turns every angle once a text is over its first context: keys made before are void.
        if self._steps and any(len(row) - 1 in self._steps for row in self.rows):
            self.reset()

    def select_sequences(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.rows, self.pads = [self.rows[i] for i in rows], [self.pads[i] for i in rows]
        self.cache.keep(rows)

    def replace(self, text: Sequence[int]) -> None:
        """Another text in place of the only row; the cache keeps what the two begin with."""
        [row] = self.rows
        fed = row[: self.cache.length]
        same = next((i for i, (a, b) in enumerate(zip(fed, text, strict=False)) if a != b), min(len(fed), len(text)))
        same = min(same, len(text) - 1)  # the last token is always fed: its logits are wanted
        self.rows = [list(text)]
        crossed = any((len(fed) <= n) != (len(text) <= n) for n in self._steps)
        if crossed or not self.cache.rewind(same):
            self.reset()


def scaling(layer: s.Layer) -> s.RopeScaling | None:
    return None if layer.attn.rope is None else layer.attn.rope.scaling


def longrope_contexts(spec: s.Spec) -> frozenset[int]:
    """The lengths at which LongRoPE changes its angles."""
    found = (scaling(layer) for layer in spec.pattern)
    return frozenset(how.original_context for how in found if isinstance(how, s.LongRope))


def context_limit(spec: s.Spec) -> int | None:
    """The longest text in tokens; None where positions are made to go on for ever (dynamic scaling)."""
    limit = spec.context
    for layer in spec.pattern:
        match scaling(layer):
            case s.DynamicNTK():
                return None
            case s.Yarn() | s.Llama3Scaling() as scaled:
                limit = max(limit, int(scaled.factor * scaled.original_context))
            case _:
                pass
    return limit if spec.positions is None else min(limit, spec.positions.length)


@torch.inference_mode()
def events(texts: Sequences, request: Request, detokenizers: Sequence[Detokenizer | None]) -> Iterator[TokenOutput]:
    """The rows' tokens as they come. A row that has ended leaves the batch."""
    limits = [remaining_tokens(texts.model.spec, row, request.max_tokens) for row in texts.rows]
    replies = [Reply(d, n, request.stop_ids, request.stop) for d, n in zip(detokenizers, limits, strict=True)]
    seeds = request.seeds or tuple(secrets.randbits(63) for _ in replies)
    sampler = Sampler(request.sampling, seeds, texts.rows, texts.model.spec.vocab, texts.model.device)
    matchers = request.grammar.start(texts.rows, request.stop_ids) if request.grammar is not None else None
    rows = list(range(len(replies)))  # of the request, in the batch's order
    while rows:
        logits = texts.step()
        if logits.amax().isnan():
            raise OneblockError("the model's logits are not numbers: load it with dtype bfloat16 or float32")
        ids = sampler.next(logits, matchers.allowed() if matchers is not None else None)
        chosen = chosen_from(logits, ids, request.logprobs)
        texts.append_tokens([c.id for c in chosen])
        last = matchers.push([c.id for c in chosen]) if matchers is not None else [False] * len(rows)
        for row, c, ends in zip(rows, chosen, last, strict=True):
            text = replies[row].push(c.id, ends)
            yield replace(c, row=row, text=text, finish=replies[row].finish)
        going = [i for i, row in enumerate(rows) if replies[row].finish is None]
        if 0 < len(going) < len(rows):
            texts.select_sequences(going)
            sampler.select_sequences(going)
            if matchers is not None:
                matchers.keep(going)
        rows = [rows[i] for i in going]


def chosen_from(logits: Tensor, ids: Tensor, n: int | None) -> list[TokenOutput]:
    """The chosen ids (B,), with log-probabilities where they are asked for."""
    if n is None:
        return [TokenOutput(row, id) for row, id in enumerate(ids.tolist())]
    own = logprobs(logits, ids).tolist()
    top: list[tuple[tuple[int, float], ...]] = [()] * len(own)
    if n:
        likely = (x.tolist() for x in top_logprobs(logits, n))
        top = [tuple(zip(i, p, strict=True)) for i, p in zip(*likely, strict=True)]
    return [TokenOutput(row, id, logprob=own[row], top=top[row]) for row, id in enumerate(ids.tolist())]


def check(spec: s.Spec, prompts: Sequence[Sequence[int]], request: Request) -> None:
    """What a user can mend, before anything is computed."""
    vocab = spec.vocab + spec.embed_extra
    for ids in prompts:
        if not ids:
            raise OneblockError("the prompt is empty and the tokenizer has no token to begin with: write something")
        wrong = next((i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab), None)
        if wrong is not None:
            raise OneblockError(
                f"token id {wrong!r} is not in the vocabulary: ids are whole numbers from 0 to {vocab - 1}"
            )
        remaining_tokens(spec, ids, request.max_tokens)
    wrong = next((i for i in request.sampling.logit_bias if i not in range(spec.vocab)), None)
    if wrong is not None:
        raise OneblockError(f"logit_bias for {wrong!r}: ids are whole numbers from 0 to {spec.vocab - 1}")


def remaining_tokens(spec: s.Spec, prompt: Sequence[int], max_tokens: int | None) -> int:
    """How many tokens may follow the prompt."""
    limit = context_limit(spec)
    if limit is None:
        return max_tokens or spec.context
    if len(prompt) >= limit:
        raise OneblockError(
            f"the prompt has {len(prompt)} tokens and the model's context {limit}: shorten the prompt"
            f"{'' if spec.positions else ', or load it for longer texts (--context N --rope-scaling yarn)'}"
        )
    return limit - len(prompt) if max_tokens is None else min(max_tokens, limit - len(prompt))
