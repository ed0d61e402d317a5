"""Sampling parameters, and the ranges of all inference options, for the Python API and the flags alike.

Nothing here imports torch: `oneblock generate --help` reads these ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from oneblock.config import SEED, Range, check_range, check_ranges
from oneblock.errors import OneblockError

DEFAULT_MAX_TOKENS = 256

# Bounds of temperature, penalties and bias keep logits finite in fp32.
TEMPERATURE = Range(0, 1_000_000)
TOP_K = Range(0)
TOP_P = Range(above=0, high=1)
MIN_P = Range(0, 1)
REPETITION_PENALTY = Range(1e-6, 1_000_000)
PENALTY = Range(-1_000_000, 1_000_000)  # presence and frequency
MAX_LOGIT_BIAS = 1e30

MAX_TOKENS = Range(1, 2**31 - 1)
CONTEXT = Range(1, 2**27)  # tokens
NUM_SPECULATIVE_TOKENS = Range(0, 64)
BATCH_SIZE = Range(1, 4096)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments; None: the default of the model's generation_config.json."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None


class StructuredOutputOptions(TypedDict, total=False):
    """The fields of `StructuredOutput` as keyword arguments; one at most."""

    schema: str | Mapping[str, Any] | bool | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None


class Options(SamplingOptions, StructuredOutputOptions, total=False):
    """Keyword arguments of `generate`, `stream` and `chat`, besides sampling and structured output."""

    max_tokens: int | None  # default 256; None: as many as the context holds
    stop: str | Sequence[str]  # strings that end the reply and are not part of it
    stop_ids: Sequence[int]  # token ids that end it, besides the model's EOS
    ignore_eos: bool  # continue after the model's EOS
    seed: int | Sequence[int] | None  # prompt i of a list uses seed + i; a list gives each prompt its own
    top_logprobs: int  # alternatives to return for each token


OPTIONS = frozenset(Options.__annotations__)


@dataclass(frozen=True)
class SamplingParams:
    """How a token is sampled from logits. The defaults sample from the model's own distribution."""

    temperature: Annotated[float, TEMPERATURE] = 1.0  # divides the logits; 0: always the most likely token
    top_k: Annotated[int, TOP_K] = 0  # keep this many of the most likely tokens; 0: all
    top_p: Annotated[float, TOP_P] = 1.0  # keep the smallest set of tokens with this much of the probability
    min_p: Annotated[float, MIN_P] = 0.0  # keep tokens at least this likely, relative to the most likely one
    # divides positive logits of tokens in the prompt or the reply, multiplies negative ones (arXiv:1909.05858)
    repetition_penalty: Annotated[float, REPETITION_PENALTY] = 1.0
    presence_penalty: Annotated[float, PENALTY] = 0.0  # subtracted from the logits of tokens in the reply
    frequency_penalty: Annotated[float, PENALTY] = 0.0  # the same, times the token's count in the reply
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added to the logits of these ids

    def __post_init__(self) -> None:
        check_ranges(self)
        if not isinstance(self.logit_bias, Mapping):
            raise OneblockError('logit_bias must map token ids to numbers, such as {"50256": -100}')
        for id, bias in self.logit_bias.items():
            is_number = isinstance(bias, int | float) and not isinstance(bias, bool) and not math.isnan(bias)
            if not is_number or bias > MAX_LOGIT_BIAS:
                raise OneblockError(
                    f"logit_bias of {id} is {bias!r}, but it must be a number of at most {MAX_LOGIT_BIAS:g}"
                    f" (-inf bans a token)"
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def needs_counts(self) -> bool:
        """Whether a penalty depends on the tokens of the prompt or the reply."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def derive_seeds(seed: int | Sequence[int] | None, batch: int) -> tuple[int, ...]:
    """One seed per prompt: seed, seed + 1, ..; those of a list as they are; none without a seed."""
    if seed is None:
        return ()
    if isinstance(seed, Sequence):
        check_range("seed", tuple(seed), SEED, tuple[int, ...])
        if len(seed) != batch:
            raise OneblockError(f"seed has {len(seed)} values for {batch} prompts: give one integer, or one per prompt")
        return tuple(seed)
    check_range("seed", seed, SEED, int)
    return tuple((seed + i) % 2**63 for i in range(batch))


def build_sampling_params(options: Mapping[str, Any], generation_config: Mapping[str, Any]) -> SamplingParams:
    """The given options over the defaults of a generation_config.json, which samples only with `do_sample`."""
    sampled = ("temperature", "top_k", "top_p", "min_p") if generation_config.get("do_sample") else ()
    defaults = {name: generation_config.get(name) for name in ("repetition_penalty", *sampled)}
    given = {name: options.get(name) for name in SamplingOptions.__annotations__}
    return SamplingParams(**{n: v for values in (defaults, given) for n, v in values.items() if v is not None})
