"""The cost of quantization: a quantized model beside its original, on the same text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oneblock.model import Decoder
from oneblock.quant.quantize import weight_bytes


@dataclass(frozen=True)
class Quality:
    name: str
    bytes: int  # weights, quantized weights and scales
    perplexity: float
    error: float  # standard error of the perplexity's ratio to the reference's
    divergence: float  # mean KL divergence of the reference's distribution from this one's, in nats
    agreement: float  # share of positions where both have the same most likely token
    speed: float  # decoded tokens per second, batch of one


@dataclass(frozen=True)
class Reference:
    """The original model's predictions for ids (B, T)."""

    logprobs: Tensor  # (B, T, V), in bf16 to save memory
    losses: Tensor  # (B, T - 1), fp32


@torch.inference_mode()
def compute_reference(model: Decoder, ids: Tensor) -> Reference:
    logprobs, losses = zip(*(score_sequence(model, row) for row in ids), strict=True)
    return Reference(torch.stack([x.bfloat16() for x in logprobs]), torch.stack(losses))


@torch.inference_mode()
def measure_quality(name: str, model: Decoder, ids: Tensor, reference: Reference, speed: float) -> Quality:
    """Compare a model with the reference for the same ids (B, T)."""
    losses, divergence, agreement = [], 0.0, 0.0
    for row, expected in zip(ids, reference.logprobs, strict=True):
        logprobs, loss = score_sequence(model, row)
        losses.append(loss)
        divergence += (expected.float().exp() * (expected - logprobs)).sum().item()
        agreement += (logprobs.argmax(-1) == expected.argmax(-1)).sum().item()
    loss = torch.stack(losses)
    perplexity = math.exp(loss.mean().item())
    error = ((loss - reference.losses).std() / loss.numel() ** 0.5).item()
    n = ids.numel()
    return Quality(name, weight_bytes(model), perplexity, error, divergence / n, agreement / n, speed)


def score_sequence(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, V) of ids (T,) and the loss of each next token (T - 1,), in fp32."""
    logprobs = model(ids[None])[0].float().log_softmax(-1)
    return logprobs, -logprobs[:-1].gather(-1, ids[1:, None])[:, 0]
