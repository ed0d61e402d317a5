"""From options to a training state: weights, model transformations in the right order, task and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from oneblock.data.loader import BatchLoader
from oneblock.errors import OneblockError, missing_extra
from oneblock.kernels.build import has_compiler, use_compile_cache
from oneblock.kernels.fast_model import prepare_for_training
from oneblock.kernels.substitution import as_subclass
from oneblock.model import Decoder, init_weights
from oneblock.model.context import ForwardContext
from oneblock.model.decoder import Block
from oneblock.model.mlp import Moe
from oneblock.parallel.parallelize import parallelize, parallelize_submodules
from oneblock.parallel.world import World
from oneblock.plan import flops
from oneblock.spec import Spec
from oneblock.store.load import load_model
from oneblock.train.load_balancing import Routing
from oneblock.train.loop import State, start
from oneblock.train.machine import peak_flops, product_dtype, use_device
from oneblock.train.options import Loop, Train
from oneblock.train.prepare import Job, dropout_of
from oneblock.train.task import Pretraining, Task

# Seconds of matmuls at the measured peak from which a CPU run repays the compiler's 10 to 20 seconds: blocks of
# dimension 128 to 384 run 12 to 27% faster compiled, those of 768 3%.
COMPILE_PAYS_FROM = 240.0


def build_state(
    job: Job, options: Train, world: World | None = None, make_task: Callable[[Decoder], Task] | None = None
) -> State:
    """The state of step 0, laid out over the ranks.

    `make_task` builds the task of a model that is not laid out yet; default: pretraining on the job's data.
    """
    world = world or World()
    model = initial_model(job, options)
    task = None if make_task is None else make_task(model)
    model = transform_model(model, options.loop, world)
    task = task or pretraining_task(model, job, options, world)
    parallelize_submodules(task.to(model.device), world)
    return start(model, options.optimizer, task)


def initial_model(job: Job, options: Train) -> Decoder:
    """The model on its device, with random weights or those of --init."""
    if job.init is None:
        model = Decoder(job.spec)
        init_weights(model, options.loop.seed, options.start.zero_init_residual, options.start.embed_std)
    else:
        loaded = load_model(job.init, torch.float32).model  # its weights are mapped pages of the file: copied
        model = Decoder(loaded.spec)
        model.load_state_dict(loaded.state_dict())
    return model.to(use_device(options.loop.device))


def transform_model(model: Decoder, loop: Loop, world: World | None = None) -> Decoder:
    """Use fast kernels, fp8, activation checkpointing, sharding, compilation, in that order; `compile` auto is off."""
    prepare_for_training(model)
    if loop.fp8:
        convert_to_fp8(model)
    checkpoint_activations(model, loop.activation_checkpointing)
    model = parallelize(model, world or World())
    if loop.compile == "on":
        use_compile_cache()
        for block in model.blocks:
            block.compile()
    return model


def pretraining_task(model: Decoder, job: Job, options: Train, world: World) -> Pretraining:
    """Next-token prediction on the job's data."""
    loop, objective = options.loop, options.objective
    pin = loop.device.startswith("cuda")
    batches = BatchLoader(job.rows(loop), world.data_rank, world.data_ranks, loop.workers, pin)
    has_experts = any(isinstance(m, Moe) for m in model.modules())
    routing = Routing(model, objective, world.all_reduce_sum) if has_experts else None
    return Pretraining(batches, dropout_of(options.dropouts), objective.z_loss, routing)


# ------------------------------------------------------------------ activation checkpointing

# Expensive to recompute and small to keep; norms, activations and rotations are recomputed
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


class CheckpointedBlock(Block):
    """A block that keeps its input for the backward pass and recomputes its activations (arXiv:1604.06174)."""

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        return checkpoint(super().forward, x, ctx, layer, use_reentrant=False)


class SelectivelyCheckpointedBlock(Block):
    """A block that keeps its input and the results of its matmuls and attention, and recomputes the others."""

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, keep_policy)
        return checkpoint(super().forward, x, ctx, layer, use_reentrant=False, context_fn=contexts)


def keep_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(model: Decoder, mode: str) -> None:
    """Replace every block by one that recomputes all activations (full), or the cheap ones (selective)."""
    if mode != "none":
        subclass = CheckpointedBlock if mode == "full" else SelectivelyCheckpointedBlock
        for i, block in enumerate(model.blocks):
            model.blocks[i] = as_subclass(block, subclass)


# ------------------------------------------------------------------ compilation and fp8


def compiles(spec: Spec, loop: Loop, context: int) -> bool:
    """Whether blocks are compiled with `compile` auto: always on GPUs, in long runs on CPUs.

    Callers record the answer: compiled sums round differently, and a resumed run must continue as it began.
    """
    if loop.compile != "auto":
        return loop.compile == "on"
    device = use_device(loop.device)
    if device.type == "cuda":
        return True
    if device.type != "cpu" or not has_compiler():
        return False
    if loop.seconds is not None:
        return loop.seconds > 2 * COMPILE_PAYS_FROM
    work = flops.train(spec, context) * loop.steps * loop.batch_size * loop.gradient_accumulation_steps * context
    return work / peak_flops(device, product_dtype(loop)) > COMPILE_PAYS_FROM


def convert_to_fp8(model: Decoder) -> None:
    """Run the matmuls of the blocks in float8 (arXiv:2209.05433), by torchao."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise OneblockError("--fp8 needs a GPU with float8 matmuls (Ada, Hopper or later): leave it out")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise missing_extra("--fp8", "torchao", "lowbit") from None
    convert_to_float8_training(model, module_filter_fn=fits_fp8)


def fits_fp8(module: nn.Module, name: str) -> bool:
    """Whether it is a matrix of a block, other than a router's, whose sides are multiples of 16, as float8 needs."""
    return (
        isinstance(module, nn.Linear)
        and name.startswith("blocks.")
        and not name.endswith(("router", "shared_gate"))
        and module.in_features % 16 == module.out_features % 16 == 0
    )
