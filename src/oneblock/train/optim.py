"""What moves the weights, and how fast: optimizers, the running average, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oneblock.errors import missing_extra
from oneblock.model import Decoder
from oneblock.train.options import Optimizer, Schedule

Group = dict[str, Any]


class Optimizers:
    """Several optimizers of torch as one: Muon for the matrices of the blocks, AdamW for the rest."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[Group]:
        return [group for part in self.parts for group in part.param_groups]

    def state_of(self, p: nn.Parameter) -> dict[str, Any]:
        """What is kept of one parameter: AdamW's two moments, Muon's momentum."""
        return next((part.state[p] for part in self.parts if p in part.state), {})

    def set_rate(self, share: float) -> None:
        """Each group's learning rate as a share of its peak."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's are compiled: a new number would be a new program
                group["lr"].fill_(group["peak"] * share)
            else:
                group["lr"] = group["peak"] * share

    def step(self, good: Tensor) -> None:
        """Move the weights unless `good` is False. On GPUs nobody waits for the answer if every part can skip alone."""
        if good.device.type == "cuda" and all(group.get("fused") for group in self.param_groups):
            for part in self.parts:
                part.found_inf = (~good).float()  # type: ignore[attr-defined] # how torch.amp tells it
                part.step()
        elif bool(good):
            for part in self.parts:
                part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def build(model: Decoder, options: Optimizer) -> Optimizers:
    """The optimizers of a run; each group knows its peak rate."""
    matrices = set(matrix_names(model)) if options.optimizer == "muon" else set()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        groups = decay_groups(model, ((name, p) for name, p in named if name in matrices), options)
        parts.append(muon(groups, options))
    if rest := [(name, p) for name, p in named if name not in matrices]:
        make = adamw8bit if options.optimizer == "adamw8bit" else adamw
        parts.append(make(decay_groups(model, rest, options), options))
    for part in parts:
        for group in part.param_groups:
            group["peak"] = float(group["lr"])
    return Optimizers(*parts)


def adamw(groups: list[Group], options: Optimizer) -> torch.optim.Optimizer:
    """AdamW with all of a step in one kernel."""
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)


def adamw8bit(groups: list[Group], options: Optimizer) -> torch.optim.Optimizer:
    """AdamW whose moments take a byte each; torchao compiles its step at the first use."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise missing_extra("--optimizer adamw8bit", "torchao", "lowbit") from None
    betas = (options.beta1, options.beta2)
    return AdamW8bit(groups, lr=options.lr, betas=betas, eps=options.eps)


def muon(groups: list[Group], options: Optimizer) -> torch.optim.Optimizer:
    """Steps whose singular values are all about one, on AdamW's scale of rates (arXiv:2502.16982, section 2.2)."""
    rate = options.lr if options.matrix_lr is None else options.matrix_lr
    return torch.optim.Muon(groups, lr=rate, momentum=options.momentum, adjust_lr_fn="match_rms_adamw")


# ------------------------------------------------------------------ which parameters


def decay_groups(model: Decoder, named: Iterable[tuple[str, nn.Parameter]], options: Optimizer) -> list[Group]:
    """Decayed ones and others; shards of whole tensors are apart from both, since one kernel takes either."""
    decayed = set(decayed_names(model))
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for name, p in named:
        key = (options.decay_all or name in decayed, getattr(p, "device_mesh", None))
        groups.setdefault(key, []).append(p)
    order = sorted(groups.items(), key=lambda item: not item[0][0])
    return [{"params": found, "weight_decay": options.weight_decay * decays} for (decays, _), found in order]


def decayed_names(model: nn.Module) -> Iterator[str]:
    """Weights of products. Norms, biases, gates and embeddings (a tied head is one) are not among them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        if p.dim() > 1 and id(p) not in embeddings and not name.endswith("bias"):
            yield name


def matrix_names(model: Decoder) -> Iterator[str]:
    """The blocks' matrices, which Muon is for. Stacked experts are left to AdamW: torch's Muon takes matrices alone."""
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.dim() == 2 and name.endswith("weight"):
            yield name


# ------------------------------------------------------------------ the running average


@torch.no_grad()
def average(ema: dict[str, Tensor], model: nn.Module, decay: float, good: Tensor) -> None:
    """After a good step, move the average a little towards the weights."""
    found, weight = dict(model.named_parameters()), good.float() * (1 - decay)
    for name, mean in ema.items():
        mean.lerp_(found[name].detach(), weight)


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
