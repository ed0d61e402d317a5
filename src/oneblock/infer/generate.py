"""The decode loop: one token per sequence and step.

There is no prefill phase and no decode phase: each step feeds the tokens that are not yet in the KV cache (a prompt, or
the last token) and computes the logits of the last position only.

Shapes: B sequences, T new tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.config import Range, check_ranges
from oneblock.errors import OneblockError
from oneblock.infer.cache import KVCache
from oneblock.infer.options import MAX_TOKENS, SamplingParams
from oneblock.infer.sample import Sampler, compute_logprobs, compute_top_logprobs
from oneblock.infer.stop import FinishReason, Reply
from oneblock.infer.structured_output import CompiledGrammar
from oneblock.model import Decoder
from oneblock.text.stream import Detokenizer

if TYPE_CHECKING:
    from oneblock.kernels.compiled_step import CompiledStep


PREFILL_CHUNK = 4096  # tokens of all sequences per forward pass: longer ones need more memory and are no faster
PREALLOCATED = 1 << 17  # tokens after the prompt that a cache reserves at most; it grows beyond

# One forward pass at a time: it uses every core anyway, and fused kernels and compiled steps own scratch memory.
FORWARD_LOCK = threading.RLock()


@dataclass(frozen=True)
class Request:
    """Sampling parameters, limits and stop conditions of every prompt of a batch."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: Annotated[int | None, MAX_TOKENS] = None  # None: as many as the context holds
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()  # one per prompt; none: random
    top_logprobs: Annotated[int | None, Range(0)] = None  # this many alternatives per token; None: no logprobs at all
    grammar: CompiledGrammar | None = None  # structured output

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class TokenOutput:
    """One generated token of one sequence."""

    row: int
    id: int
    text: str = ""  # text that became final with this token; empty inside a character
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), most likely first


class Sequences:
    """Sequences that are decoded together with one KV cache. Shorter prompts are padded on the left."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        compiled: CompiledStep | None = None,
        int8_cache: bool = False,
    ):
        self.model, self.compiled, self.int8_cache = model, compiled, int8_cache
        self.rows = [list(prompt) for prompt in prompts]
        longest = max(map(len, self.rows))
        self.capacity = min(capacity, longest + PREALLOCATED)
        self.pads = [longest - len(row) for row in self.rows]
        self._switch_lengths = longrope_switch_lengths(model.spec)
        # The angles of these depend on the length of the whole sequence, so a prompt cannot be read in chunks.
        length_dependent = s.LongRope | s.DynamicNTK
        self._one_chunk = any(isinstance(rope_scaling(layer), length_dependent) for layer in model.spec.pattern)
        self.reset()

    def reset(self) -> None:
        """Start with an empty cache; the next step feeds every token again."""
        model = self.model
        self.cache = KVCache(model.spec, len(self.rows), self.capacity, model.dtype, model.device, self.int8_cache)

    def step(self) -> Tensor:
        """Feed the tokens that the cache lacks; return the logits of every sequence's last position, (B, V)."""
        start, device = self.cache.length, self.model.device
        ids = [[0] * (pad - start) + row[max(start - pad, 0) :] for row, pad in zip(self.rows, self.pads, strict=True)]
        new, positions = torch.tensor(ids, device=device), None
        if any(self.pads):
            columns = torch.arange(start, start + len(ids[0]), device=device)
            positions = columns - torch.tensor(self.pads, device=device)[:, None]
        with FORWARD_LOCK:
            if self.compiled is not None and start and len(ids[0]) == 1:
                return self.compiled(new, positions, self.cache)
            return self.model.logits(self._hidden_states(new, positions)[:, -1])

    def _hidden_states(self, ids: Tensor, positions: Tensor | None = None, last: int = 1) -> Tensor:
        """The hidden states of the last positions, (B, last, dim), in chunks where the input is long."""
        length, chunk = ids.shape[1], max(PREFILL_CHUNK // len(ids), last)
        if self._one_chunk or length <= chunk:
            return self.model.hidden_states(ids, positions=positions, cache=self.cache, logits_to_keep=last)
        sizes = [length % chunk or chunk, *[chunk] * ((length - 1) // chunk)]
        split_positions = [None] * len(sizes) if positions is None else positions.split(sizes, 1)
        *early, final = zip(ids.split(sizes, 1), split_positions, strict=True)
        for chunk_ids, chunk_positions in early:
            self.model.hidden_states(chunk_ids, positions=chunk_positions, cache=self.cache, logits_to_keep=1)
        return self.model.hidden_states(final[0], positions=final[1], cache=self.cache, logits_to_keep=last)

    def score_draft_tokens(self, draft_ids: Sequence[int]) -> Tensor:
        """Feed one sequence's new tokens and its draft tokens; the logits after the last token and each draft, (n, V).

        Afterwards the cache holds the draft tokens and the row does not: rewind it by those that are rejected.
        """
        [row] = self.rows
        if not draft_ids:
            return self.step()
        new = torch.tensor([row[self.cache.length :] + list(draft_ids)], device=self.model.device)
        with FORWARD_LOCK:
            return self.model.logits(self._hidden_states(new, last=len(draft_ids) + 1)[0])

    def append_tokens(self, ids: Sequence[int]) -> None:
        """Append one token to every sequence."""
        for row, id in zip(self.rows, ids, strict=True):
            row.append(id)
        # LongRoPE changes every angle beyond its original context: keys computed before are invalid.
        if self._switch_lengths and any(len(row) - 1 in self._switch_lengths for row in self.rows):
            self.reset()

    def select_sequences(self, rows: Sequence[int]) -> None:
        """Keep these rows and drop the others."""
        self.rows, self.pads = [self.rows[i] for i in rows], [self.pads[i] for i in rows]
        self.cache.select_rows(rows)

    def replace_prompt(self, prompt: Sequence[int]) -> None:
        """Replace the only sequence; the cache keeps the common prefix of both."""
        [row] = self.rows
        cached = row[: self.cache.length]
        length = min(common_prefix_length(cached, prompt), len(prompt) - 1)  # the last token's logits are needed
        self.rows = [list(prompt)]
        switched = any((len(cached) <= n) != (len(prompt) <= n) for n in self._switch_lengths)
        if switched or not self.cache.rewind(length):
            self.reset()


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def rope_scaling(layer: s.Layer) -> s.RopeScaling | None:
    return None if layer.attn.rope is None else layer.attn.rope.scaling


def longrope_switch_lengths(spec: s.Spec) -> frozenset[int]:
    """The sequence lengths at which LongRoPE switches its angles."""
    scalings = (rope_scaling(layer) for layer in spec.pattern)
    return frozenset(scaling.original_context for scaling in scalings if isinstance(scaling, s.LongRope))


def context_limit(spec: s.Spec) -> int | None:
    """The longest sequence in tokens; None with dynamic NTK scaling, which has no limit.

    `spec.context` (max_position_embeddings) includes the scaling of Llama 3; YaRN configs may state either length.
    """
    limit = spec.context
    for layer in spec.pattern:
        match rope_scaling(layer):
            case s.DynamicNTK():
                return None
            case s.Yarn(factor=factor, original_context=original_context):
                limit = max(limit, int(factor * original_context))
            case _:
                pass
    return limit if spec.positions is None else min(limit, spec.positions.length)


# ------------------------------------------------------------------ the loop


def start_reply(spec: s.Spec, prompt: Sequence[int], request: Request, detokenizer: Detokenizer | None = None) -> Reply:
    """The reply to a prompt before its first token; without a detokenizer it has no text."""
    limit = remaining_tokens(spec, prompt, request.max_tokens)
    matcher = request.grammar.start_matcher(prompt, request.stop_ids) if request.grammar is not None else None
    return Reply(detokenizer, limit, request.stop_ids, request.stop, matcher)


def allowed_tokens(replies: Sequence[Reply]) -> Tensor | None:
    """The mask of structured output, bool (B, V); None without structured output."""
    masks = [reply.matcher.allowed_tokens() for reply in replies if reply.matcher is not None]
    return torch.stack(masks) if masks else None


@torch.inference_mode()
def generate_tokens(sequences: Sequences, request: Request, replies: Sequence[Reply]) -> Iterator[TokenOutput]:
    """Decode a batch until every reply has finished; a finished sequence leaves the batch."""
    model = sequences.model
    sampler = Sampler(request.sampling, request.seeds, sequences.rows, model.spec.vocab, model.device)
    rows = list(range(len(replies)))  # the index of each row's reply
    while rows:
        logits = check_logits(sequences.step())
        ids = sampler.next(logits, allowed_tokens([replies[row] for row in rows]))
        outputs = build_token_outputs(logits, ids, request.top_logprobs)
        sequences.append_tokens([output.id for output in outputs])
        for row, output in zip(rows, outputs, strict=True):
            text = replies[row].push(output.id)
            yield replace(output, row=row, text=text, finish_reason=replies[row].finish_reason)
        active = [i for i, row in enumerate(rows) if replies[row].finish_reason is None]
        if 0 < len(active) < len(rows):
            sequences.select_sequences(active)
            sampler.select_sequences(active)
        rows = [rows[i] for i in active]


def check_logits(logits: Tensor) -> Tensor:
    """The same logits; OneblockError where they are NaN, as after an fp16 overflow."""
    if logits.amax().isnan():
        raise OneblockError("the model's logits are NaN: load it with dtype bfloat16 or float32")
    return logits


def build_token_outputs(logits: Tensor, ids: Tensor, top: int | None) -> list[TokenOutput]:
    """The outputs of sampled ids (B,): with `top` not None their logprobs, and those of the `top` likeliest ids."""
    if top is None:
        return [TokenOutput(row, id) for row, id in enumerate(ids.tolist())]
    logprobs = compute_logprobs(logits, ids).tolist()
    alternatives: list[tuple[tuple[int, float], ...]] = [()] * len(logprobs)
    if top:
        top_ids, values = (x.tolist() for x in compute_top_logprobs(logits, top))
        alternatives = [tuple(zip(i, p, strict=True)) for i, p in zip(top_ids, values, strict=True)]
    return [TokenOutput(row, id, logprob=logprobs[row], top=alternatives[row]) for row, id in enumerate(ids.tolist())]


# ------------------------------------------------------------------ checks


def check_request(spec: s.Spec, prompts: Sequence[Sequence[int]], request: Request) -> None:
    """Raise OneblockError for prompts or options that do not fit the model, before anything is computed."""
    vocab = spec.vocab + spec.embed_extra
    for ids in prompts:
        if not ids:
            raise OneblockError("the prompt is empty and the tokenizer has no BOS token: give a prompt")
        wrong = next((i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab), None)
        if wrong is not None:
            raise OneblockError(f"token id {wrong!r} is not in the vocabulary: ids are integers from 0 to {vocab - 1}")
        remaining_tokens(spec, ids, request.max_tokens)
    wrong = next((i for i in request.sampling.logit_bias if i not in range(spec.vocab)), None)
    if wrong is not None:
        raise OneblockError(f"logit_bias for {wrong!r}: ids are integers from 0 to {spec.vocab - 1}")


def remaining_tokens(spec: s.Spec, prompt: Sequence[int], max_tokens: int | None) -> int:
    """The number of tokens that may follow the prompt."""
    limit = context_limit(spec)
    if limit is None:
        return max_tokens or spec.context
    if len(prompt) >= limit:
        raise OneblockError(
            f"the prompt has {len(prompt)} tokens and the model's context {limit}: shorten the prompt"
            f"{'' if spec.positions else ', or extend the context (--context N --rope-scaling yarn)'}"
        )
    return limit - len(prompt) if max_tokens is None else min(max_tokens, limit - len(prompt))
