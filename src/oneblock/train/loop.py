"""The one loop: batches in, a loss, steps of the optimizer. Pretraining and tuning differ in what they pass in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from oneblock.data.batch_shards import shard_batch
from oneblock.data.packed import Batch
from oneblock.model import Decoder
from oneblock.parallel.world import World
from oneblock.train import optim
from oneblock.train.losses import Loss
from oneblock.train.machine import precision
from oneblock.train.optim import Optimizers, average, lr_ratio, micro_batches_before, micro_batches_in
from oneblock.train.options import Loop, Optimizer, Schedule

Batches = Callable[[int], Batch]  # the n-th batch of the run, a pure function of n


@dataclass
class State:
    """All that a step changes: what a checkpoint holds."""

    model: Decoder
    optimizer: Optimizers
    ema: dict[str, Tensor] | None = None  # the running average of the weights
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # in the loop, over all sittings
    stop: bool = False  # ask the loop to end after this step


@dataclass(frozen=True)
class Metrics:
    """Of one step. Tensors stay on the device until somebody looks: looking waits for the device."""

    step: int  # steps done with this one
    loss: Tensor
    grad_norm: Tensor  # global norm before clipping
    is_finite: Tensor  # False: loss or gradient norm is NaN or Inf, and the weights were not changed
    lr: float
    tokens: int  # in this step
    seconds: float  # since the run began, all sittings
    batches: range = range(0)  # the step's batches
    aux_metrics: dict[str, Tensor] = field(default_factory=dict)  # further metrics of the loss, by name


Observe = Callable[[State, Metrics], None]


class ModelWithLoss(nn.Module):
    """A model and what it minimises, as one module that can be wrapped."""

    def __init__(self, model: Decoder, loss: Loss, after: Callable[[Tensor], None] | None = None):
        """`after` is called when a step is done, with whether it was good."""
        super().__init__()
        self.model, self.loss, self.after = model, loss, after

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.loss(self.model, batch)
        return found if isinstance(found, tuple) else (found, {})


def start(model: Decoder, options: Optimizer) -> State:
    learned = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    ema = {name: p.detach().clone() for name, p in learned} if options.ema else None
    return State(model, optim.build(model, options), ema)


def train(
    state: State,
    batches: Batches,
    loss: Loss | nn.Module,
    loop: Loop,
    optimizer: Optimizer,
    schedule: Schedule,
    observe: Observe = lambda state, metrics: None,
    world: World | None = None,
) -> None:
    """Step until the run is done or `state.stop`; `observe` is called after every step, and may do anything.

    `loss` may be a wrapped `Learner`, as parallel training makes one.
    """
    learner = loss if isinstance(loss, nn.Module) else ModelWithLoss(state.model, loss)
    engine = TrainStep(learner, batches, loop, optimizer, schedule, world or World())
    began = time.perf_counter() - state.seconds
    while (progress := done(state, loop)) < 1 and not engine.world.any_rank(state.stop):
        rate = lr_ratio(progress, state.step, schedule)
        state.optimizer.set_rate(rate)
        seed = (engine.world.rank << 40) + loop.seed * 1_000_003 + state.step
        torch.manual_seed(seed % 2**63)  # dropout, too, is a function of (seed, step), another on each rank
        made = engine.update(state)
        if made is None:
            break
        state.step += 1
        state.tokens += made.tokens
        state.seconds = time.perf_counter() - began
        observe(state, made.metrics(state, optimizer.lr * rate))
        state.seconds = time.perf_counter() - began


def done(state: State, loop: Loop) -> float:
    """How much of the run is behind us, 0 to 1."""
    return state.seconds / loop.seconds if loop.seconds is not None else state.step / max(loop.steps, 1)


@dataclass(frozen=True)
class StepResult:
    """What a step made."""

    loss: Tensor
    grad_norm: Tensor
    is_finite: Tensor
    tokens: int
    batches: range
    aux_metrics: dict[str, Tensor]

    def metrics(self, state: State, lr: float) -> Metrics:
        rest = (self.tokens, state.seconds, self.batches, self.aux_metrics)
        return Metrics(state.step, self.loss, self.grad_norm, self.is_finite, lr, *rest)


@dataclass(frozen=True)
class TrainStep:
    """What stays the same from step to step."""

    learner: nn.Module
    batches: Batches
    loop: Loop
    optimizer: Optimizer
    schedule: Schedule
    world: World

    def update(self, state: State) -> StepResult | None:
        """One step of the optimizer; None where the run was asked to stop before its last batch."""
        micro_batches, warmup = self.loop.gradient_accumulation_steps, self.schedule.batch_size_warmup_steps
        first = micro_batches_before(state.step, micro_batches, warmup)
        numbers = range(first, first + micro_batches_in(state.step, micro_batches, warmup))
        parts = [shard_batch(self.batches(n), self.world) for n in numbers]
        device = next(state.model.parameters()).device
        count = torch.tensor(sum(part.count for part in parts), dtype=torch.float64, device=device)
        count = self.world.all_reduce_sum(count)
        seen: dict[str, Tensor] = {"loss": torch.zeros((), device=device)}
        for part in parts:
            if state.stop and self.world.size == 1:
                state.optimizer.zero_grad()
                return None
            weight = (part.count / count).float()
            self.backward(part.to(device), weight, seen, last=part is parts[-1])
        seen = {key: self.world.all_reduce_sum(value) for key, value in seen.items()}
        self.world.all_reduce_grads(state.model)
        norm = self.world.clip_grad_norm(state.model.parameters(), self.optimizer.max_grad_norm or float("inf"))
        good = torch.isfinite(norm) & torch.isfinite(seen["loss"])
        state.optimizer.step(good)
        state.optimizer.zero_grad()
        if (after := self.after()) is not None:
            after(good)
        if state.ema is not None:
            average(state.ema, state.model, self.optimizer.ema, good)
        told = device.type == "cpu" or self.world.mesh.pp > 1
        tokens = int(count) if told else sum(part.count for part in parts) * self.world.data_ranks
        return StepResult(seen.pop("loss"), norm, good, tokens, numbers, seen)

    def after(self) -> Callable[[Tensor], None] | None:
        """The learner's own, whatever it is wrapped in."""
        return getattr(getattr(self.learner, "module", self.learner), "after", None)

    def backward(self, part: Batch, weight: Tensor, seen: dict[str, Tensor], last: bool) -> None:
        """Add one batch's share to the gradients and to what is shown; `weight` is its share of the step's targets."""
        with self.world.sync_grads(self.learner, last):
            with precision(self.loop):
                value, shown = self.learner(part)
            (value * (weight * self.world.grad_divisor)).backward()
        for key, x in {"loss": value.detach(), **shown}.items():
            seen[key] = seen.get(key, 0.0) + x.detach() * weight
