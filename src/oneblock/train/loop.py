"""The one loop: batches in, a loss, steps of the optimizer. Pretraining and tuning differ in what they pass in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from oneblock.data.rows import Batch
from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.train.losses import Loss
from oneblock.train.optim import adamw, share
from oneblock.train.options import Loop, Optimizer, Schedule

Batches = Callable[[int], Batch]  # the n-th batch of the run, a pure function of n


@dataclass
class State:
    """All that a step changes: what a checkpoint holds."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # in the loop, over all sittings
    stop: bool = False  # ask the loop to end after this step


@dataclass(frozen=True)
class Metrics:
    """Of one step. Tensors stay on the device until somebody looks: looking waits for the device."""

    step: int  # steps done with this one
    loss: Tensor
    norm: Tensor  # of the gradient, before clipping
    lr: float
    tokens: int  # in this step
    seconds: float  # since the run began, all sittings


Observe = Callable[[State, Metrics], None]


def start(model: Decoder, options: Optimizer) -> State:
    return State(model, adamw(model, options))


def train(
    state: State,
    batches: Batches,
    loss: Loss,
    loop: Loop,
    optimizer: Optimizer,
    schedule: Schedule,
    observe: Observe = lambda state, metrics: None,
) -> None:
    """Step until the run is done or `state.stop`; `observe` is called after every step, and may do anything."""
    compute = torch.compile(loss) if loop.compile else loss
    began = time.perf_counter() - state.seconds
    while (progress := done(state, loop)) < 1 and not state.stop:
        lr = optimizer.lr * share(progress, state.step, schedule)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(loop.seed * 1_000_003 + state.step)  # dropout, too, is a function of (seed, step)
        value, norm, tokens = update(state, batches, compute, loop, optimizer.clip)
        state.step += 1
        state.tokens += tokens
        state.seconds = time.perf_counter() - began
        observe(state, Metrics(state.step, value, norm, lr, tokens, state.seconds))
        state.seconds = time.perf_counter() - began


def done(state: State, loop: Loop) -> float:
    """How much of the run is behind us, 0 to 1."""
    return state.seconds / loop.seconds if loop.seconds is not None else state.step / max(loop.steps, 1)


def update(state: State, batches: Batches, loss: Loss, loop: Loop, clip: float) -> tuple[Tensor, Tensor, int]:
    """One step of the optimizer: the mean loss, the norm of the gradient, the tokens learned from."""
    device = state.model.embed.weight.device
    first = state.step * loop.accumulate
    parts = [batches(n) for n in range(first, first + loop.accumulate)]
    count = sum(part.count for part in parts)
    total = torch.zeros((), device=device)
    for part in parts:
        with precision(loop):
            value = loss(state.model, part.to(device)) * (part.count / count)
        value.backward()
        total += value.detach()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip or float("inf"), foreach=True)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return total, norm, count


# ------------------------------------------------------------------ precision


def precision(loop: Loop) -> torch.autocast:
    """Weights stay fp32; products are bf16 where that was asked for, or where the machine has instructions for it."""
    device = torch.device(loop.device).type
    on = loop.dtype == "bfloat16" or (loop.dtype == "auto" and has_bf16(device))
    return torch.autocast(device, dtype=torch.bfloat16, enabled=on)


def has_bf16(device: str) -> bool:
    """Whether bf16 products are fast: on CPUs with AVX512-BF16 or AMX, on GPUs since Ampere."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    found = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return device == "cpu" and any(ask() for ask in found if ask is not None)


def use_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise OneblockError(f"no device {name!r} on this machine: use --device cpu") from None
    return device


def with_dropout(loss: Callable[..., Tensor], dropout: object) -> Loss:
    return partial(loss, dropout=dropout)
