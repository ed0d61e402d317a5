"""Optimizers, exponential moving average of the weights, learning-rate and batch-size schedules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oneblock.errors import missing_extra
from oneblock.train.options import Optimizer, Schedule

Group = dict[str, Any]
Named = Sequence[tuple[str, nn.Parameter]]


class Optimizers:
    """Several torch optimizers as one: Muon for the matrices of the blocks, AdamW for the others."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[Group]:
        return [group for part in self.parts for group in part.param_groups]

    def state_of(self, p: nn.Parameter) -> dict[str, Any]:
        """The optimizer state of one parameter: AdamW's moments or Muon's momentum; empty before the first step."""
        return next((part.state[p] for part in self.parts if p in part.state), {})

    def set_lr(self, ratio: float) -> None:
        """Set each group's learning rate to this share of its peak."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's step is compiled, and a new number would recompile it
                group["lr"].fill_(group["peak_lr"] * ratio)
            else:
                group["lr"] = group["peak_lr"] * ratio

    def step(self, is_finite: Tensor) -> None:
        """Update the weights unless `is_finite` is False; fused optimizers decide it on the GPU, without a sync."""
        if is_finite.device.type == "cuda" and all(group.get("fused") for group in self.param_groups):
            for part in self.parts:
                part.found_inf = (~is_finite).float()  # type: ignore[attr-defined] # as torch.amp.GradScaler does
                part.step()
        elif bool(is_finite):
            for part in self.parts:
                part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def build(named: Named, options: Optimizer, embeddings: Collection[int] = ()) -> Optimizers:
    """The optimizers of named parameters; `embeddings` are the ids of embedding matrices. Groups record `peak_lr`."""
    matrices = [x for x in named if options.optimizer == "muon" and is_block_matrix(*x)]
    others = [x for x in named if options.optimizer != "muon" or not is_block_matrix(*x)]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(muon(decay_groups(matrices, options, embeddings), options))
    if others:
        make = adamw8bit if options.optimizer == "adamw8bit" else adamw
        parts.append(make(decay_groups(others, options, embeddings), options))
    for part in parts:
        for group in part.param_groups:
            group["peak_lr"] = float(group["lr"])
    return Optimizers(*parts)


def adamw(groups: list[Group], options: Optimizer) -> torch.optim.Optimizer:
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)


def adamw8bit(groups: list[Group], options: Optimizer) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments; torchao compiles its step at the first use."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise missing_extra("--optimizer adamw8bit", "torchao", "lowbit") from None
    betas = (options.beta1, options.beta2)
    return AdamW8bit(groups, lr=options.lr, betas=betas, eps=options.eps)


def muon(groups: list[Group], options: Optimizer) -> torch.optim.Optimizer:
    """Muon with learning rates on AdamW's scale (arXiv:2502.16982, section 2.2)."""
    lr = options.lr if options.matrix_lr is None else options.matrix_lr
    return torch.optim.Muon(groups, lr=lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw")


def is_block_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon takes the parameter. Stacked experts are left to AdamW: torch's Muon takes 2-D weights only."""
    return name.startswith("blocks.") and p.dim() == 2 and name.endswith("weight")


def decay_groups(named: Named, options: Optimizer, embeddings: Collection[int]) -> list[Group]:
    """Parameter groups with and without weight decay, one per device mesh, since a fused kernel takes one kind."""
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for name, p in named:
        has_decay = options.decay_all or (id(p) not in embeddings and is_weight_matrix(name, p))
        groups.setdefault((has_decay, getattr(p, "device_mesh", None)), []).append(p)
    order = sorted(groups.items(), key=lambda item: not item[0][0])
    return [{"params": params, "weight_decay": options.weight_decay * decays} for (decays, _), params in order]


def is_weight_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether it is the weight of a matrix product: no norm, bias or gate."""
    return p.dim() > 1 and not name.endswith("bias")


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], params: Mapping[str, Tensor], decay: float, is_finite: Tensor) -> None:
    """Move the moving average towards the weights, unless the step was skipped."""
    weight = is_finite.float() * (1 - decay)
    for name, mean in ema.items():
        mean.lerp_(params[name].detach(), weight)


# ------------------------------------------------------------------ learning rate and batch size


def lr_ratio(progress: float, step: int, schedule: Schedule) -> float:
    """The learning rate as a share of its peak, `progress` (0 to 1) into the run, in its step number `step`.

    Linear warmup ends exactly at 1; the decay runs from there to `min_lr_ratio` at progress 1.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    warmup = progress * schedule.warmup / step if step else 0.0  # share of the run, also of one measured in seconds
    left = max(0.0, 1 - progress)
    if schedule.schedule == "cosine":
        decayed = 0.5 * (1 - math.cos(math.pi * min(1.0, left / (1 - warmup)))) if warmup < 1 else 0.0
    elif schedule.schedule == "linear":
        decayed = left / (1 - warmup) if warmup < 1 else 0.0
    else:
        decay = min(schedule.decay, 1 - warmup)
        decayed = min(1.0, left / decay) if decay > 0 else 1.0
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * decayed


def micro_batches_in(step: int, full: int, warmup: int) -> int:
    """Micro-batches of a step: they grow linearly from 1 to `full` over the first `warmup` steps."""
    return full if step >= warmup else max(1, round(full * (step + 1) / (warmup + 1)))


def micro_batches_before(step: int, full: int, warmup: int) -> int:
    """Micro-batches of all earlier steps: the number of the first one of this step."""
    early = sum(micro_batches_in(s, full, warmup) for s in range(min(step, warmup)))
    return early + max(0, step - warmup) * full
