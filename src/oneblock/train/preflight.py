"""What a run will take, from `plan`, and the refusal of one that its machine cannot hold."""

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
from oneblock.train import loggers as sinks
from oneblock.train.machine import peak_flops, peak_memory, product_dtype, total_memory, use_device
from oneblock.train.optim import batches_before
from oneblock.train.options import Loop, Train
from oneblock.train.prepare import Job
from oneblock.train.progress import lasting, size

UTILISATION = 0.4  # of the measured peak, that a run ordinarily gets


@dataclass(frozen=True)
class Estimate:
    """Of a whole run; memory and peak are one device's."""

    memory: memory.Training
    have: int  # bytes of memory that are free
    base: int  # bytes that the process takes without the run
    steps: int | None  # None: as many as fit into the time
    run: Run  # tokens, FLOPs, seconds, dollars
    gpu: Gpu | None  # as the table of prices has it
    peak: float  # FLOPs per second, measured
    dtype: torch.dtype  # of products
    devices: int
    checkpoint: int  # bytes
    disk: int  # bytes that all checkpoints take together
    free: int  # bytes on the disk

    def lines(self, loop: Loop) -> str:
        """As `--dry-run` shows them."""
        kind, each = str(self.dtype).removeprefix("torch."), " for each device" if self.devices > 1 else ""
        states, run, gpu = size(self.memory.states), self.run, self.gpu
        took = f"about {lasting(run.seconds)}" if loop.seconds is None else f"{run.seconds:,.0f} seconds"
        cost = "n/a: no GPU with a known price"
        if gpu:
            cost = f"about ${run.dollars:,.2f}: {self.devices} x {gpu.name.upper()} at ${gpu.price:.2f} an hour"
        return (
            f"memory  about {size(self.memory.total)} of {size(self.have)}{each}: "
            f"{states} for weights, gradients, optimizer; products in {kind}\n"
            f"time    {took} for {tokens(run.tokens)} at {UTILISATION:.0%} of the {rate(self.peak * self.devices)} "
            f"measured here\n"
            f"disk    about {size(self.disk)} of {size(self.free)}, checkpoints of {size(self.checkpoint)}\n"
            f"cost    {cost}"
        )


def estimate(job: Job, options: Train, world: World | None = None) -> Estimate:
    world, loop = world or World(), options.loop
    device = use_device(loop.device)
    known = gpu_of(device)
    peak, per_token = peak_of(loop), flops.train(job.spec, job.context, loop.activation_checkpointing == "full")
    here = replace(known or Gpu("", 0, 0, 0, 0), flops=peak)
    row = loop.batch_size * job.context
    if loop.seconds is None:
        steps, total = (
            loop.steps,
            batches_before(loop.steps, loop.gradient_accumulation_steps, options.schedule.batch_size_warmup_steps)
            * row,
        )
    else:
        steps, total = None, round(loop.seconds * world.size * peak * UTILISATION / per_token)
    took = run(per_token, total, here, world.size, UTILISATION, None)
    if loop.seconds is not None:
        took = replace(took, seconds=loop.seconds)
    each = checkpoint_bytes(job, options)
    return Estimate(
        memory=need(job, options, loop.batch_size, loop.activation_checkpointing, world),
        have=total_memory(device),
        base=peak_memory(device),
        steps=steps,
        run=took,
        gpu=known,
        peak=peak,
        dtype=product_dtype(loop),
        devices=world.size,
        checkpoint=each,
        disk=each * (options.watch.keep + 1) + 4 * params.total(job.spec) * bool(options.optimizer.ema),
        free=free_disk(options.resume or options.out or Path("runs")),
    )


def need(job: Job, options: Train, batch: int, recompute: ActivationCheckpointing, world: World) -> memory.Training:
    """Memory of one device for micro-batches of `batch` rows on all ranks together."""
    loop, optimizer = options.loop, options.optimizer
    config = memory.TrainingConfig(
        dtype=str(product_dtype(loop)).removeprefix("torch."),
        activation_checkpointing=recompute,
        optimizer=optimizer.optimizer,
        accumulate=loop.gradient_accumulation_steps > 1 or world.uses_ddp,  # DistributedDataParallel keeps its buckets
        ema=bool(optimizer.ema),
        cpu=torch.device(loop.device).type == "cpu",
        parallelism=over(world.mesh),
    )
    return memory.training(job.spec, job.context, -(-batch // world.data_ranks), config)


def over(mesh: Mesh) -> memory.Parallelism:
    """The mesh as far as it makes less of what a rank holds."""
    return memory.Parallelism(mesh.fsdp, mesh.tp, mesh.cp, mesh.ep, mesh.pp)


def checkpoint_bytes(job: Job, options: Train) -> int:
    """Weights in fp32, and what the optimizer and the average keep of them."""
    kept = memory.optimizer_bytes(job.spec, options.optimizer.optimizer)
    return 4 * params.total(job.spec) * (1 + bool(options.optimizer.ema)) + kept


# ------------------------------------------------------------------ the machine


def peak_of(loop: Loop) -> float:
    """FLOPs per second of one device in products as this run has them."""
    return _measured(loop.device, product_dtype(loop))


@cache
def _measured(device: str, dtype: torch.dtype) -> float:
    small = torch.device(device).type == "cpu" and dtype == torch.float32  # slow, and at its peak from 512 on
    return peak_flops(torch.device(device), dtype, 1024 if small else 0)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU as the table of prices has it: "NVIDIA H100 80GB HBM3" is its h100."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return named(torch.cuda.get_device_name(device))


def named(name: str) -> Gpu | None:
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    return next((gpu for gpu in GPUS.values() if set(gpu.name.split("-")) <= words), None)


def free_disk(folder: Path) -> int:
    """Where the folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ------------------------------------------------------------------ refusals


def check(job: Job, options: Train, found: Estimate, world: World | None = None) -> None:
    """OneblockError where the run cannot be, with the numbers that disagree."""
    world = world or World()
    shapes(job, options, world)
    sinks.check(options.watch)
    if options.preflight and (wrong := verdict(job, options, found, world)):
        raise OneblockError(f"{wrong}; --no-preflight tries all the same")


def check_mesh(spec: Spec, context: int, options: Train, mesh: Mesh) -> None:
    """OneblockError if the model or the options do not go with the mesh."""
    optimizer = options.optimizer.optimizer
    if mesh.size > 1 and options.loop.seconds is not None:
        raise OneblockError(f"--seconds {options.loop.seconds:g} is for one rank, since clocks differ; use --steps")
    if mesh.cp > 1 and options.documents:
        raise OneblockError(f"--documents is not supported with cp={mesh.cp}; leave one of them out")
    if optimizer != "adamw" and (mesh.fsdp > 1 or mesh.tp > 1 or mesh.ep > 1):
        raise OneblockError(f"--optimizer {optimizer} needs unsharded weights, not {mesh}; use dp, cp or pp, or adamw")
    parallelize.check_mesh(spec, context, mesh)


def shapes(job: Job, options: Train, world: World) -> None:
    spec, rows, vocab = job.spec, options.loop.batch_size, job.tokenizer.vocab_size
    if vocab > spec.vocab:
        raise OneblockError(
            f"the tokenizer has {vocab:,} tokens, but {options.model} a vocabulary of {spec.vocab:,}: "
            f"give the tokenizer that belongs to it"
        )
    if spec.positions is not None and job.context > spec.positions.length:
        raise OneblockError(
            f"--context is {job.context:,}, but {options.model} has a table of {spec.positions.length:,} positions: "
            f"give at most that"
        )
    if rows % world.data_ranks:
        raise OneblockError(
            f"--batch-size {rows} does not divide by {world.data_ranks} ranks: give a multiple, such as "
            f"{-(-rows // world.data_ranks) * world.data_ranks}"
        )


def verdict(job: Job, options: Train, found: Estimate, world: World | None = None) -> str | None:
    """Why the machine cannot hold the run, and what would fit; None: it can."""
    world = world or World()
    if found.memory.total > found.have:
        each = "each device needs" if world.size > 1 else "it needs"
        return (
            f"{each} about {size(found.memory.total)} of memory, but {size(found.have)} are free: "
            f"{remedies(job, options, found.have, world)}"
        )
    if found.disk > found.free:
        return (
            f"checkpoints need about {size(found.disk)} of disk, but {size(found.free)} are free: "
            f"lower --keep, or choose another --out"
        )
    return None


def remedies(job: Job, options: Train, have: int, world: World) -> str:
    """The largest batches that fit, as they are and with everything computed again."""
    found: list[str] = []
    loop, best = options.loop, 0
    modes: tuple[ActivationCheckpointing, ...] = (loop.activation_checkpointing, "full")
    for mode in dict.fromkeys(modes):
        rows = largest(job, options, have, mode, world)
        again = "--activation-checkpointing full" if mode != loop.activation_checkpointing else ""
        if rows > best:
            best = rows
            same = rows == loop.batch_size
            steps = loop.batch_size * loop.gradient_accumulation_steps // rows
            batch = "" if same else f"--batch-size {rows} --gradient-accumulation-steps {steps}"
            flags = " ".join(part for part in (again, batch) if part)
            found.append(f"{flags} fits ({size(need(job, options, rows, mode, world).total)})")
    if found:
        return ", or ".join(found)
    least = need(job, options, world.data_ranks, "full", world).total
    return f"even one row with --activation-checkpointing full takes {size(least)}; make the model or --context smaller"


def largest(job: Job, options: Train, have: int, mode: ActivationCheckpointing, world: World) -> int:
    """The largest batch that fits and divides the rows of a step; 0: none."""
    rows = options.loop.batch_size * options.loop.gradient_accumulation_steps
    for batch in range(options.loop.batch_size, 0, -1):
        fair = batch % world.data_ranks == 0 and rows % batch == 0
        if fair and need(job, options, batch, mode, world).total <= have:
            return batch
    return 0


# ------------------------------------------------------------------ words


def tokens(n: float) -> str:
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if n >= unit:
            return f"{n / unit:.3g} {name} tokens"
    return f"{n:,.0f} tokens"


def rate(n: float) -> str:
    return f"{n / 1e12:.3g} TFLOP/s" if n >= 1e12 else f"{n / 1e9:.3g} GFLOP/s"
