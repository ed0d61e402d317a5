"""From a loaded model to one that decodes fast: every transformation, in the one order in which they compose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.kernels.cpu_modules import optimize_for_cpu
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import Decoder
from oneblock.parallel.process_group import ProcessGroup
from oneblock.parallel.tensor_parallel import RowParallelLinear, TensorParallel
from oneblock.quant.gptq import calibrate
from oneblock.quant.quantize import QuantConfig, quantize


def prepare_for_inference(
    model: Decoder,
    *,
    quant: QuantConfig | None = None,
    calibration_ids: Tensor | None = None,
    report: Callable[[int], None] = lambda layer: None,
    ranks: ProcessGroup | None = None,
    device: str | torch.device | None = None,
) -> Decoder:
    """Transform a model in place; may be called again, except that a sharded model is neither quantized nor sharded.

    1. Quantize (`quant`; by GPTQ on `calibration_ids` (B, T), reporting each layer): ranges belong to whole matrices.
    2. Shard over `ranks`: slices of quantized layers stay quantized.
    3. Move to `device`: a rank never holds the whole model on its GPU.
    4. Select the attention backend and fuse modules for CPUs: fused modules decide per call which layers one kernel may
       compute, so that wrapped or hooked layers are called.
    Compilation comes last and is lazy (`kernels.compiled_step`); it notices whatever changes the model afterwards.
    """
    sharded = ranks is not None and ranks.size > 1
    if (quant or sharded) and any(isinstance(m, RowParallelLinear) for m in model.modules()):
        raise OneblockError("the model is sharded already; quantize and shard in one call of prepare_for_inference")
    if quant and calibration_ids is not None:
        calibrate(model, quant, calibration_ids, report)
    elif quant:
        quantize(model, quant)
    if ranks is not None and sharded:
        TensorParallel(ranks).shard_decoder(model)
    if device is not None:
        model.to(device)
    use_fast_kernels(model, cpu_operators=True)
    optimize_for_cpu(model)
    return model
