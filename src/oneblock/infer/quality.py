"""What fewer bits cost: a model beside the one it was made of, on a text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from oneblock.infer.cache import KVCache
from oneblock.infer.quantize import weight_bytes
from oneblock.model import Decoder

DECODED = 24  # tokens over which speed is measured


@dataclass(frozen=True)
class Quality:
    name: str
    bytes: int  # of weights, codes and scales
    perplexity: float
    divergence: float  # mean KL divergence of the reference's distribution to this one's, in nats
    agreement: float  # share of places where both find the same token the likeliest
    speed: float  # tokens a second, one text at a time


@torch.inference_mode()
def reference(model: Decoder, ids: Tensor) -> Tensor:
    """Log-probabilities (B, T, V) of a text's rows (B, T), in bf16 to save memory."""
    return torch.stack([model(row[None])[0].float().log_softmax(-1).bfloat16() for row in ids])


@torch.inference_mode()
def quality(name: str, model: Decoder, ids: Tensor, expected: Tensor) -> Quality:
    """`expected` is the reference's log-probabilities of the same rows."""
    loss = divergence = same = 0.0
    for row, theirs in zip(ids, expected, strict=True):
        ours, theirs = model(row[None])[0].float().log_softmax(-1), theirs.float()
        loss -= ours[:-1].gather(-1, row[1:, None]).sum().item()
        divergence += (theirs.exp() * (theirs - ours)).sum().item()
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
    places, targets = ids.numel(), ids.numel() - len(ids)
    means = (math.exp(loss / targets), divergence / places, same / places)
    return Quality(name, weight_bytes(model), *means, speed(model, ids[0]))


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
