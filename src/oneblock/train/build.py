"""What is done to a finished model so that it trains: losses, recomputation, fp8, compilation. All from outside."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from oneblock.errors import OneblockError, missing_extra
from oneblock.kernels.build import has_compiler, use_compile_cache
from oneblock.kernels.fast_model import cast_for_autocast, use_fast_kernels
from oneblock.model import Decoder, Dropout
from oneblock.model.mlp import Moe
from oneblock.parallel.world import World
from oneblock.plan import flops
from oneblock.spec import Spec
from oneblock.train.activation_checkpointing import recompute
from oneblock.train.load_balancing import Routing
from oneblock.train.loop import ModelWithLoss
from oneblock.train.losses import Loss, pretraining
from oneblock.train.machine import peak_flops, product_dtype, use_device
from oneblock.train.options import Loop, Objective

# Seconds of products, at the machine's peak, from which a CPU run repays the compiler's 10 to 20 seconds: blocks of
# 128 to 384 run 12 to 27% faster compiled, those of 768 3%.
PAYS = 240.0


def learner_for(
    model: Decoder, loop: Loop, objective: Objective, dropout: Dropout | None, world: World
) -> ModelWithLoss:
    """The model with its loss, ready to be wrapped by what exchanges gradients. `loop.compile` auto counts as off."""
    use_fast_kernels(model)
    cast_for_autocast(model)
    if loop.fp8:
        use_fp8(model)
    recompute(model, loop.activation_checkpointing)
    if loop.compile == "on":
        use_compile_cache()
        for block in model.blocks:
            block.compile()
    experts = any(isinstance(m, Moe) for m in model.modules())
    routing = Routing(model, objective, world.all_reduce_sum) if experts else None
    loss: Loss = partial(pretraining, dropout=dropout, z_loss=objective.z_loss, routing=routing)
    return ModelWithLoss(model, loss, routing.update_expert_bias if routing else None)


def compiles(spec: Spec, loop: Loop, context: int) -> bool:
    """Whether blocks are compiled where nobody said: on GPUs always, on CPUs in long runs.

    The answer is to be recorded: compiled sums round differently, and a resumed run must go on as it began.
    """
    if loop.compile != "auto":
        return loop.compile == "on"
    device = use_device(loop.device)
    if device.type == "cuda":
        return True
    if device.type != "cpu" or not has_compiler():
        return False
    if loop.seconds is not None:
        return loop.seconds > 2 * PAYS
    work = flops.train(spec, context) * loop.steps * loop.batch_size * loop.gradient_accumulation_steps * context
    return work / peak_flops(device, product_dtype(loop)) > PAYS


def use_fp8(model: Decoder) -> None:
    """Products of the blocks in 8-bit floats (arXiv:2209.05433), by torchao."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise OneblockError("--fp8 needs a GPU with 8-bit products (Ada, Hopper or later): leave it out")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise missing_extra("--fp8", "torchao", "lowbit") from None
    convert_to_float8_training(model, module_filter_fn=fits_fp8)


def fits_fp8(module: nn.Module, name: str) -> bool:
    """Matrices of blocks whose sides are multiples of 16, as the hardware wants them; routers stay exact."""
    return (
        isinstance(module, nn.Linear)
        and name.startswith("blocks.")
        and not name.endswith(("router", "shared_gate"))
        and module.in_features % 16 == module.out_features % 16 == 0
    )
