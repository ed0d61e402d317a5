"""GPTQ (arXiv:2210.17323): int4 rounding whose errors compensate each other on calibration activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from oneblock.model import Decoder
from oneblock.model.context import ForwardContext
from oneblock.quant.formats import QuantParams, fit_quant_params, row_scales
from oneblock.quant.linear import QuantizedLinear
from oneblock.quant.modules import QuantizedLayer
from oneblock.quant.quantize import (
    QuantConfig,
    SetWeight,
    check_quantizable,
    replace_linears,
    round_to_nearest,
    tie_embedding,
)

DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean: the paper's
BATCH = 4  # calibration sequences at a time
HEADROOM = 1.1  # of a row's scale, for weights that grow as they compensate for earlier columns


@torch.no_grad()
def calibrate(
    model: Decoder, config: QuantConfig, ids: Tensor, report: Callable[[int], None] = lambda layer: None
) -> Decoder:
    """Quantize to int4 in place, layer by layer, each on the output of the quantized ones before it for ids (B, T).

    Experts and cross-attention layers are rounded to nearest. `report` gets the number of layers done.
    """
    check_quantizable(model, config)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    batches = [model.embed_tokens(batch, positions) for batch in ids.split(BATCH)]
    contexts = [ForwardContext(positions, True, backend=model.attention_backend, batch=len(x)) for x in batches]
    for layer, block in enumerate(model.blocks):
        if model.spec.layers[layer].attn.cross:
            replace_linears(block, config, round_to_nearest)
            continue
        with collect_hessians(block) as hessians:
            for x, ctx in zip(batches, contexts, strict=True):
                block(x, ctx, layer)
        replace_linears(block, config, gptq_with(hessians))
        batches = [block(x, ctx, layer) for x, ctx in zip(batches, contexts, strict=True)]
        report(layer + 1)
    output = nn.ModuleDict({"head": model.head})
    with collect_hessians(output) as hessians:
        for x in batches:
            model.logits(model.norm(x)[:, ::8])  # one position in eight suffices for the largest matrix
    replace_linears(output, config, gptq_with(hessians))
    model.head = output["head"]  # type: ignore[assignment]
    return tie_embedding(model)


@contextmanager
def collect_hessians(root: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum x.T @ x over all inputs x of each linear layer, by its name. Layers with hooks are never fused."""
    hessians: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        gram = x.T @ x
        hessians[name] = hessians[name].add_(gram) if name in hessians else gram

    hooks = []
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(lambda m, args, y, name=name: add(name, args[0])))
    try:
        yield hessians
    finally:
        for hook in hooks:
            hook.remove()


def gptq_with(hessians: dict[str, Tensor]) -> SetWeight:
    """Quantize by GPTQ the layers that have a Hessian, by rounding to nearest the others."""

    def set_weight(name: str, layer: QuantizedLayer, weight: Tensor) -> None:
        if name in hessians and isinstance(layer, QuantizedLinear):
            layer.set_weight(*gptq_quantize(weight, hessians.pop(name), layer.group))
        else:
            round_to_nearest(name, layer, weight)

    return set_weight


def gptq_quantize(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, QuantParams]:
    """q (N, K) and its parameters; later columns compensate for the rounding error of each column."""
    remaining, upper = weight.float().clone(), cholesky_of_inverse(hessian)
    scale, q, params = row_scales(remaining, group, HEADROOM), torch.empty_like(remaining, dtype=torch.uint8), []
    for start in range(0, remaining.shape[1], group):
        end = start + group
        columns, root = remaining[:, start:end], upper[start:end, start:end]
        params.append(fit_quant_params(columns[:, None], scale, hessian.diagonal()[start:end]))
        errors = torch.empty_like(columns)
        for j in range(group):
            column = columns[:, j, None, None]
            rounded = params[-1].quantize(column)
            errors[:, j] = (column - params[-1].dequantize(rounded))[:, 0, 0] / root[j, j]
            columns[:, j:] -= errors[:, j, None] * root[j, j:]
            q[:, start + j] = rounded[:, 0, 0]
        remaining[:, end:] -= errors @ upper[start:end, end:]
    fields = zip(*((p.group_qscale, p.qzero) for p in params), strict=True)
    return q, QuantParams(scale, *(torch.cat(x, 1) for x in fields))


def cholesky_of_inverse(hessian: Tensor) -> Tensor:
    """The upper triangle U with U.T @ U the inverse of the Hessian (K, K), damped until it is positive definite."""
    diagonal = hessian.diagonal()
    damping = DAMPING * diagonal.mean().clamp(min=1e-8)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + torch.diag_embed(damping.expand_as(diagonal)))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping = damping * 10
