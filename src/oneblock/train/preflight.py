"""Preflight: memory, time, disk and cost of a run from `plan`, and refusal of a run that does not fit the machine."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from oneblock.errors import OneblockError
from oneblock.parallel import parallelize
from oneblock.parallel.mesh import Mesh
from oneblock.parallel.world import World
from oneblock.plan import flops, memory, params
from oneblock.plan.activations import ActivationCheckpointing
from oneblock.plan.training import GPUS, Gpu, Run, run
from oneblock.spec import Spec
from oneblock.train.loggers import check_loggers
from oneblock.train.machine import peak_flops, peak_memory, product_dtype, total_memory, use_device
from oneblock.train.optim import micro_batches_before
from oneblock.train.options import Loop, Train
from oneblock.train.prepare import Job
from oneblock.units import format_bytes, format_count, format_duration, format_scaled

EXPECTED_MFU = 0.4  # share of the measured peak, recomputed FLOPs included


@dataclass(frozen=True)
class Estimate:
    """Estimated requirements of a run; memory and peak FLOPs are per device."""

    memory: memory.Training
    available: int  # bytes of free memory
    base: int  # bytes of the process before the run
    steps: int | None  # None with --seconds
    run: Run  # tokens, FLOPs, seconds, dollars
    gpu: Gpu | None  # None: not in the price table
    peak: float  # measured FLOP/s
    dtype: torch.dtype  # of the matmuls
    devices: int
    checkpoint: int  # bytes
    disk: int  # bytes of all checkpoints
    free: int  # free bytes on the disk

    def lines(self, loop: Loop) -> str:
        """The lines that `--dry-run` prints."""
        kind, each = str(self.dtype).removeprefix("torch."), " for each device" if self.devices > 1 else ""
        states, run, gpu = format_bytes(self.memory.states), self.run, self.gpu
        duration = f"about {format_duration(run.seconds)}" if loop.seconds is None else f"{run.seconds:,.0f} seconds"
        peak = format_scaled(self.peak * self.devices, "FLOP/s")
        cost = "n/a: no GPU with a known price"
        if gpu:
            cost = f"about ${run.dollars:,.2f}: {self.devices} x {gpu.name.upper()} at ${gpu.price:.2f} an hour"
        return (
            f"memory  about {format_bytes(self.memory.total)} of {format_bytes(self.available)}{each}: "
            f"{states} for weights, gradients and optimizer state; {kind} matmuls\n"
            f"time    {duration} for {format_count(run.tokens)} tokens at {EXPECTED_MFU:.0%} of the measured {peak}\n"
            f"disk    about {format_bytes(self.disk)} of {format_bytes(self.free)}, "
            f"{format_bytes(self.checkpoint)} per checkpoint\n"
            f"cost    {cost}"
        )


def estimate(job: Job, options: Train, world: World | None = None) -> Estimate:
    """Estimate a run; measures the peak matmul rate of the device."""
    world, loop = world or World(), options.loop
    device = use_device(loop.device)
    gpu = find_gpu(device)
    peak, per_token = measure_peak(loop), flops.train(job.spec, job.context, loop.activation_checkpointing == "full")
    measured = replace(gpu or Gpu("", 0, 0, 0, 0), flops=peak)
    row = loop.batch_size * job.context
    if loop.seconds is None:
        steps, total = (
            loop.steps,
            micro_batches_before(loop.steps, loop.gradient_accumulation_steps, options.schedule.batch_size_warmup_steps)
            * row,
        )
    else:
        steps, total = None, round(loop.seconds * world.size * peak * EXPECTED_MFU / per_token)
    expected = run(per_token, total, measured, world.size, EXPECTED_MFU, None)
    if loop.seconds is not None:
        expected = replace(expected, seconds=loop.seconds)
    checkpoint = checkpoint_bytes(job, options)
    return Estimate(
        memory=estimate_memory(job, options, loop.batch_size, loop.activation_checkpointing, world),
        available=total_memory(device),
        base=peak_memory(device),
        steps=steps,
        run=expected,
        gpu=gpu,
        peak=peak,
        dtype=product_dtype(loop),
        devices=world.size,
        checkpoint=checkpoint,
        disk=checkpoint * (options.watch.keep + 1) + 4 * params.total(job.spec) * bool(options.optimizer.ema),
        free=free_disk(options.resume or options.out or Path("runs")),
    )


def estimate_memory(
    job: Job, options: Train, batch: int, checkpointing: ActivationCheckpointing, world: World
) -> memory.Training:
    """Memory of one device for micro-batches of `batch` sequences on all ranks together."""
    loop, optimizer = options.loop, options.optimizer
    config = memory.TrainingConfig(
        dtype=str(product_dtype(loop)).removeprefix("torch."),
        activation_checkpointing=checkpointing,
        optimizer=optimizer.optimizer,
        accumulate=loop.gradient_accumulation_steps > 1 or world.uses_ddp,  # DDP keeps its gradient buckets
        ema=bool(optimizer.ema),
        cpu=torch.device(loop.device).type == "cpu",
        parallelism=parallelism_of(world.mesh),
    )
    return memory.training(job.spec, job.context, -(-batch // world.data_ranks), config)


def parallelism_of(mesh: Mesh) -> memory.Parallelism:
    """The parallelism degrees of the mesh that divide what a rank holds."""
    return memory.Parallelism(mesh.fsdp, mesh.tp, mesh.cp, mesh.ep, mesh.pp)


def checkpoint_bytes(job: Job, options: Train) -> int:
    """fp32 weights, optimizer state and EMA weights."""
    optimizer = memory.optimizer_bytes(job.spec, options.optimizer.optimizer)
    return 4 * params.total(job.spec) * (1 + bool(options.optimizer.ema)) + optimizer


# ------------------------------------------------------------------ the machine


def measure_peak(loop: Loop) -> float:
    """Measured FLOP/s of one device in matmuls of the run's dtype."""
    return _measured(loop.device, product_dtype(loop))


@cache
def _measured(device: str, dtype: torch.dtype) -> float:
    small = torch.device(device).type == "cpu" and dtype == torch.float32  # slow, and at its peak from size 512
    return peak_flops(torch.device(device), dtype, 1024 if small else 0)


def find_gpu(device: torch.device) -> Gpu | None:
    """The entry of the price table: "NVIDIA H100 80GB HBM3" -> h100."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return find_gpu_by_name(torch.cuda.get_device_name(device))


def find_gpu_by_name(name: str) -> Gpu | None:
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    return next((gpu for gpu in GPUS.values() if set(gpu.name.split("-")) <= words), None)


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ------------------------------------------------------------------ refusals


def check_run(job: Job, options: Train, estimate: Estimate, world: World | None = None) -> None:
    """Raise OneblockError where sizes disagree or the run does not fit the machine."""
    world = world or World()
    check_sizes(job, options, world)
    check_loggers(options.watch)
    if options.preflight and (problem := find_shortage(job, options, estimate, world)):
        raise OneblockError(f"{problem}; --no-preflight starts anyway")


def check_mesh(spec: Spec, context: int, options: Train, mesh: Mesh) -> None:
    """OneblockError if the model or the options do not go with the mesh."""
    optimizer = options.optimizer.optimizer
    if mesh.size > 1 and options.loop.seconds is not None:
        raise OneblockError(f"--seconds {options.loop.seconds:g} is for one rank, since clocks differ; use --steps")
    if mesh.cp > 1 and options.documents:
        raise OneblockError(f"--documents is not supported with cp={mesh.cp}; leave one of them out")
    if optimizer != "adamw" and (mesh.fsdp > 1 or mesh.tp > 1 or mesh.ep > 1):
        raise OneblockError(f"--optimizer {optimizer} needs unsharded weights, not {mesh}; use dp, cp or pp, or adamw")
    if options.loop.fp8 and mesh.tp > 1:  # torchao's layers replace those that multiply by a shard
        raise OneblockError(f"--fp8 is not supported with tp={mesh.tp}; use dp or fsdp, or leave --fp8 out")
    parallelize.check_mesh(spec, context, mesh)


def check_sizes(job: Job, options: Train, world: World) -> None:
    spec, rows, vocab = job.spec, options.loop.batch_size, job.tokenizer.vocab_size
    if vocab > spec.vocab:
        raise OneblockError(
            f"the tokenizer has {vocab:,} tokens, but {options.model} a vocabulary of {spec.vocab:,}: "
            f"use the tokenizer of the model"
        )
    if spec.positions is not None and job.context > spec.positions.length:
        raise OneblockError(
            f"--context is {job.context:,}, but {options.model} has a table of {spec.positions.length:,} positions: "
            f"use at most that"
        )
    if rows % world.data_ranks:
        raise OneblockError(
            f"--batch-size {rows} is not divisible by {world.data_ranks} data-parallel ranks: use a multiple, such as "
            f"{-(-rows // world.data_ranks) * world.data_ranks}"
        )


def find_shortage(job: Job, options: Train, estimate: Estimate, world: World | None = None) -> str | None:
    """The reason why the run does not fit the machine, and settings that fit; None if it fits."""
    world = world or World()
    if estimate.memory.total > estimate.available:
        each = "each device needs" if world.size > 1 else "it needs"
        return (
            f"{each} about {format_bytes(estimate.memory.total)} of memory, but {format_bytes(estimate.available)} "
            "are free: "
            f"{suggest_settings(job, options, estimate.available, world)}"
        )
    if estimate.disk > estimate.free:
        return (
            f"checkpoints need about {format_bytes(estimate.disk)} of disk, but {format_bytes(estimate.free)} "
            "are free: lower --keep, or choose another --out"
        )
    return None


def suggest_settings(job: Job, options: Train, available: int, world: World) -> str:
    """The largest batch sizes that fit, with the current and with full activation checkpointing."""
    suggestions: list[str] = []
    loop, best = options.loop, 0
    modes: tuple[ActivationCheckpointing, ...] = (loop.activation_checkpointing, "full")
    for mode in dict.fromkeys(modes):
        rows = largest_batch(job, options, available, mode, world)
        again = "--activation-checkpointing full" if mode != loop.activation_checkpointing else ""
        if rows > best:
            best = rows
            same = rows == loop.batch_size
            steps = loop.batch_size * loop.gradient_accumulation_steps // rows
            batch = "" if same else f"--batch-size {rows} --gradient-accumulation-steps {steps}"
            flags = " ".join(part for part in (again, batch) if part)
            total = estimate_memory(job, options, rows, mode, world).total
            suggestions.append(f"{flags} fits ({format_bytes(total)})")
    if suggestions:
        return ", or ".join(suggestions)
    least = estimate_memory(job, options, world.data_ranks, "full", world).total
    needs = f"one sequence with --activation-checkpointing full needs {format_bytes(least)}"
    return f"{needs}; use a smaller model or --context"


def largest_batch(job: Job, options: Train, available: int, mode: ActivationCheckpointing, world: World) -> int:
    """The largest batch size that fits and divides the sequences of a step; 0: none."""
    rows = options.loop.batch_size * options.loop.gradient_accumulation_steps
    for batch in range(options.loop.batch_size, 0, -1):
        divides = batch % world.data_ranks == 0 and rows % batch == 0
        if divides and estimate_memory(job, options, batch, mode, world).total <= available:
            return batch
    return 0
