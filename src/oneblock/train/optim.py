"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from oneblock.train.options import Optimizer, Schedule


def adamw(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW with all of a step in one kernel; matrices decay, all else does not."""
    decayed = set(decayed_names(model))
    groups: list[list[nn.Parameter]] = [[], []]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[name in decayed].append(p)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": options.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def decayed_names(model: nn.Module) -> Iterator[str]:
    """Weights of products. Norms, biases, gates and embeddings (a tied head is one) are not among them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        if p.dim() > 1 and id(p) not in embeddings and not name.endswith("bias"):
            yield name


def share(progress: float, step: int, schedule: Schedule) -> float:
    """The learning rate as a share of its peak, `progress` (0 to 1) into the run."""
    warm = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    return warm * (schedule.final + (1 - schedule.final) * shape(progress, schedule))


def shape(progress: float, schedule: Schedule) -> float:
    """From 1 at the start to 0 at the end: half a cosine wave, or flat with a straight line down at the end."""
    progress = min(progress, 1.0)
    if schedule.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (1 - progress) / schedule.decay) if schedule.decay else 1.0
