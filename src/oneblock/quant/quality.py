"""What fewer bits cost: a model beside the one it was made of, on a text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from oneblock.infer.cache import KVCache
from oneblock.model import Decoder
from oneblock.quant.quantize import weight_bytes

DECODED = 24  # tokens over which speed is measured


@dataclass(frozen=True)
class Quality:
    name: str
    bytes: int  # of weights, codes and scales
    perplexity: float
    error: float  # of the perplexity's ratio to the reference's: its standard error, by the spread over the text
    divergence: float  # mean KL divergence of the reference's distribution to this one's, in nats
    agreement: float  # share of places where both find the same token the likeliest
    speed: float  # tokens a second, one text at a time


@dataclass(frozen=True)
class Reference:
    """What a model makes of a text's rows (B, T)."""

    logprobs: Tensor  # (B, T, V), in bf16 to save memory
    losses: Tensor  # (B, T - 1), fp32


@torch.inference_mode()
def reference(model: Decoder, ids: Tensor) -> Reference:
    logprobs, losses = zip(*(read(model, row) for row in ids), strict=True)
    return Reference(torch.stack([x.bfloat16() for x in logprobs]), torch.stack(losses))


@torch.inference_mode()
def quality(name: str, model: Decoder, ids: Tensor, expected: Reference) -> Quality:
    """`expected` is of the same rows."""
    losses, divergence, same = [], 0.0, 0.0
    for row, theirs in zip(ids, expected.logprobs, strict=True):
        ours, loss = read(model, row)
        losses.append(loss)
        divergence += (theirs.float().exp() * (theirs - ours)).sum().item()
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
    loss = torch.stack(losses)
    perplexity = math.exp(loss.mean().item())
    error = ((loss - expected.losses).std() / loss.numel() ** 0.5).item()
    size, places = weight_bytes(model), ids.numel()
    return Quality(name, size, perplexity, error, divergence / places, same / places, speed(model, ids[0]))


def read(model: Decoder, row: Tensor) -> tuple[Tensor, Tensor]:
    """Of a row (T,) the log-probabilities (T, V) and what each next token costs (T - 1,), in fp32."""
    logprobs = model(row[None])[0].float().log_softmax(-1)
    return logprobs, -logprobs[:-1].gather(-1, row[1:, None])[:, 0]


def speed(model: Decoder, ids: Tensor) -> float:
    """Tokens a second after a prompt of 16, the better of two runs."""
    return max(decode(model, ids) for _ in range(2))


def decode(model: Decoder, ids: Tensor) -> float:
    cache = KVCache(model.spec, 1, 16 + DECODED, model.dtype, model.device)
    next_id = model(ids[None, :16], cache=cache)[:, -1:].argmax(-1)
    began = time.perf_counter()
    for _ in range(DECODED):
        next_id = model(next_id, cache=cache)[:, -1:].argmax(-1)
    return DECODED / (time.perf_counter() - began)
