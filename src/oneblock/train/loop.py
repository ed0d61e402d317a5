"""The training loop: micro-batches and a loss from a task, steps of the optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oneblock.data.batch_shards import shard_batch
from oneblock.data.packed import Batch
from oneblock.errors import OneblockError
from oneblock.kernels.fast_model import prepare_for_training
from oneblock.model import Decoder
from oneblock.parallel.parallelize import reshard, wrap_ddp
from oneblock.parallel.world import World
from oneblock.train import optim
from oneblock.train.machine import precision
from oneblock.train.optim import Optimizers, lr_ratio, micro_batches_before, micro_batches_in, update_ema
from oneblock.train.options import Loop, Optimizer, Schedule
from oneblock.train.task import Task


@dataclass
class State:
    """Everything a step changes, which is what a checkpoint holds."""

    model: Decoder
    optimizer: Optimizers
    task: Task
    ema: dict[str, Tensor] | None = None  # exponential moving average of the trained parameters
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # training time, over all sessions
    stop: bool = False  # end the loop after this step

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the model, and the trained ones of the task as `task.NAME`."""
        return named_parameters(self.model, self.task)


def named_parameters(model: Decoder, task: Task) -> Iterator[tuple[str, nn.Parameter]]:
    yield from model.named_parameters()
    yield from ((f"task.{name}", p) for name, p in task.named_parameters() if p.requires_grad)


@dataclass(frozen=True)
class StepResult:
    """Results of one step. Tensors stay on the device: reading one waits for the device."""

    loss: Tensor
    grad_norm: Tensor  # global norm before clipping
    is_finite: Tensor  # False: loss or gradient norm is NaN or Inf, and the weights were not changed
    tokens: int
    batches: range  # numbers of the micro-batches
    aux_metrics: dict[str, Tensor] = field(default_factory=dict)  # further metrics of the loss, by name


@dataclass(frozen=True)
class Metrics(StepResult):
    """Results of one step, and where the run stands after it."""

    step: int = 0  # number of steps done
    lr: float = 0.0
    seconds: float = 0.0  # training time, over all sessions


Observe = Callable[[State, Metrics], None]


class ModelWithLoss(nn.Module):
    """A model and a task as one module, which data parallelism wraps. Its forward pass is the loss."""

    def __init__(self, model: Decoder, task: Task):
        super().__init__()
        prepare_for_training(model)
        self.model, self.task = model, task

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.task.loss(self.model, batch)
        return result if isinstance(result, tuple) else (result, {})


def start(model: Decoder, options: Optimizer, task: Task | None = None) -> State:
    """The state before the first step, of a model and task that are already laid out over the ranks."""
    task = task or Task()
    named = [(name, p) for name, p in named_parameters(model, task) if p.requires_grad]
    ema = {name: p.detach().clone() for name, p in named} if options.ema else None
    embeddings = {id(m.weight) for m in [*model.modules(), *task.modules()] if isinstance(m, nn.Embedding)}
    return State(model, optim.build(named, options, embeddings), task, ema)


def train(
    state: State,
    loop: Loop,
    optimizer: Optimizer,
    schedule: Schedule,
    observe: Observe = lambda state, metrics: None,
    world: World | None = None,
) -> None:
    """Step until the run is done or `state.stop` is set; `observe` is called after every step."""
    world = world or World()
    check_task(state.task, world)
    learner = wrap_ddp(ModelWithLoss(state.model, state.task), world)
    train_step = TrainStep(learner, loop, optimizer, schedule, world)
    began = time.perf_counter() - state.seconds
    while (progress := progress_of(state, loop)) < 1 and not world.any_rank(state.stop):
        ratio = lr_ratio(progress, state.step, schedule)
        state.optimizer.set_lr(ratio)
        seed = (world.rank << 40) + loop.seed * 1_000_003 + state.step
        torch.manual_seed(seed % 2**63)  # dropout and sampled batches are functions of (seed, step, rank)
        result = train_step.update(state)
        if result is None:
            break
        state.step += 1
        state.tokens += result.tokens
        state.seconds = time.perf_counter() - began
        observe(state, Metrics(**vars(result), step=state.step, lr=optimizer.lr * ratio, seconds=state.seconds))
        state.seconds = time.perf_counter() - began


def progress_of(state: State, loop: Loop) -> float:
    """The share of the run that is done; from 1 on the run is over."""
    return state.seconds / loop.seconds if loop.seconds is not None else state.step / loop.steps


def check_task(task: Task, world: World) -> None:
    """Raise OneblockError for a task that trains modules of its own where only one stage has hidden states."""
    if world.mesh.pp > 1 and any(True for _ in task.parameters()):
        raise OneblockError(f"{type(task).__name__} has modules of its own, which pp={world.mesh.pp} does not split")


@dataclass(frozen=True)
class TrainStep:
    """One step of the optimizer over all micro-batches; these are the same in every step."""

    learner: nn.Module
    loop: Loop
    optimizer: Optimizer
    schedule: Schedule
    world: World

    def update(self, state: State) -> StepResult | None:
        """One step; None where a stop was requested before the last micro-batch."""
        numbers = self.batch_numbers(state.step)
        batches = [self.draw_batch(state, n) for n in numbers]
        device = state.model.device
        local_count = sum(batch.count for batch in batches)
        count = self.world.all_reduce_sum(torch.tensor(local_count, dtype=torch.float64, device=device))
        metrics: dict[str, Tensor] = {"loss": torch.zeros((), device=device)}
        for batch in batches:
            if state.stop and self.world.size == 1:
                state.optimizer.zero_grad()
                return None
            weight = (batch.count / count).float()
            self.backward(batch.to(device), weight, metrics, is_last=batch is batches[-1])
        metrics = {key: self.world.all_reduce_sum(value) for key, value in metrics.items()}
        grad_norm, is_finite = self.apply_gradients(state, metrics["loss"])
        exact = device.type == "cpu" or self.world.mesh.pp > 1  # elsewhere reading the count waits for the device
        tokens = int(count) if exact else local_count * self.world.data_ranks
        return StepResult(metrics.pop("loss"), grad_norm, is_finite, tokens, numbers, metrics)

    def batch_numbers(self, step: int) -> range:
        """Numbers of the step's micro-batches, which count on over the whole run."""
        full, warmup = self.loop.gradient_accumulation_steps, self.schedule.batch_size_warmup_steps
        first = micro_batches_before(step, full, warmup)
        return range(first, first + micro_batches_in(step, full, warmup))

    def draw_batch(self, state: State, n: int) -> Any:
        """Micro-batch n, the part that this rank runs."""
        batch, mesh = state.task.batch(n, state.model), self.world.mesh
        if type(batch) is Batch:
            return shard_batch(batch, self.world)
        if mesh.cp * mesh.tp * mesh.pp > 1:
            raise OneblockError(f"a {type(batch).__name__} cannot be split for cp, tp or pp: use dp and fsdp")
        return batch

    def backward(self, batch: Any, weight: Tensor, metrics: dict[str, Tensor], is_last: bool) -> None:
        """Add a micro-batch's gradients and metrics, weighted by its share of the step's targets."""
        with self.world.sync_grads(self.learner, is_last):
            with precision(self.loop):
                loss, aux_metrics = self.learner(batch)
            (loss * (weight * self.world.grad_divisor)).backward()
        for key, x in {"loss": loss.detach(), **aux_metrics}.items():
            metrics[key] = metrics.get(key, 0.0) + x.detach() * weight

    def apply_gradients(self, state: State, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce and clip gradients and step, unless they or the loss are NaN or Inf: gradient norm, and is_finite."""
        self.world.all_reduce_grads(state.model, state.task)
        params = [p for _, p in state.named_parameters()]
        grad_norm = self.world.clip_grad_norm(params, self.optimizer.max_grad_norm or float("inf"))
        is_finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        state.optimizer.step(is_finite)
        state.optimizer.zero_grad()
        state.task.finish_step(is_finite)
        if self.world.size > 1:
            reshard(state.task)  # a reference model that no backward pass resharded
        if state.ema is not None:
            update_ema(state.ema, dict(state.named_parameters()), self.optimizer.ema, is_finite)
        return grad_norm, is_finite
