"""Codes that make up for each other's rounding, on the activations of a text: GPTQ (arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from oneblock.kernels.cpu_modules import disable_fusion
from oneblock.model import Decoder
from oneblock.model.context import ForwardContext
from oneblock.quant.formats import QuantParams, fit_quant_params, scale_of
from oneblock.quant.linear import QuantizedLinear
from oneblock.quant.quantize import Codes, Fill, QuantConfig, nearest, replace, share_head

DAMP = 0.01  # of the mean of the diagonal, added to it: the paper's
ROWS = 4  # texts at a time
ROOM = 1.1  # for what later columns take over


@torch.no_grad()
def calibrate(
    model: Decoder, bits: QuantConfig, ids: Tensor, seen: Callable[[int], None] = lambda layer: None
) -> Decoder:
    """Quantise in place to 4 bits, layer after layer, each on what the quantised ones before it make of ids (B, T).

    Experts, and layers that read an image, get the nearest codes.
    """
    ctx = ForwardContext(torch.arange(ids.shape[1], device=ids.device)[None], ordered=True)
    parts = [model.embedded(part, ctx.positions) for part in ids.split(ROWS)]
    for layer, block in enumerate(model.blocks):
        if model.spec.layers[layer].attn.cross:
            replace(block, bits, nearest)
            continue
        with products(block) as sums:
            for x in parts:
                block(x, ctx, layer)
        replace(block, bits, filler(sums))
        parts = [block(x, ctx, layer) for x in parts]
        seen(layer + 1)
    rest = nn.ModuleDict({"head": model.head})
    with products(rest) as sums:
        for x in parts:
            model.logits(model.norm(x)[:, ::8])  # one place in eight says enough of the largest matrix's inputs
    replace(rest, bits, filler(sums))
    model.head = rest["head"]  # type: ignore[assignment]
    return share_head(model)


@contextmanager
def products(root: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, the sum of x.T @ x over all inputs x of each linear layer, by its name."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        found = x.T @ x
        sums[name] = sums[name].add_(found) if name in sums else found

    hooks = []
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(lambda m, args, y, name=name: add(name, args[0])))
    try:
        with disable_fusion(root):
            yield sums
    finally:
        for hook in hooks:
            hook.remove()


def filler(sums: dict[str, Tensor]) -> Fill:
    def fill(name: str, coded: Codes, weight: Tensor) -> None:
        if name in sums and isinstance(coded, QuantizedLinear):
            coded.fill(*corrected(weight, sums.pop(name), coded.group))
        else:
            nearest(name, coded, weight)

    return fill


def corrected(weight: Tensor, products: Tensor, group: int) -> tuple[Tensor, QuantParams]:
    """Codes (N, K) and what they stand for: what a column loses by rounding the later ones take over."""
    left, upper = weight.float().clone(), inverse_root(products)
    scale, codes, found = scale_of(left, group, ROOM), torch.empty_like(left, dtype=torch.uint8), []
    for start in range(0, left.shape[1], group):
        end = start + group
        here, root = left[:, start:end], upper[start:end, start:end]
        ranges = fit_quant_params(here[:, None], scale, products.diagonal()[start:end])
        wrong = torch.empty_like(here)
        for j in range(group):
            column = here[:, j, None, None]
            code = ranges.codes(column)
            wrong[:, j] = (column - ranges.numbers(code))[:, 0, 0] / root[j, j]
            here[:, j:] -= wrong[:, j, None] * root[j, j:]
            codes[:, start + j] = code[:, 0, 0]
        left[:, end:] -= wrong @ upper[start:end, end:]
        found.append(ranges)
    return codes, QuantParams(scale, *(torch.cat(x, 1) for x in zip(*((r.factor, r.zero) for r in found), strict=True)))


def inverse_root(products: Tensor) -> Tensor:
    """The upper triangle U with U.T @ U the inverse of the products (K, K), which are damped until they have one."""
    diagonal = products.diagonal()
    damp = DAMP * diagonal.mean().clamp(min=1e-8)
    while True:
        lower, wrong = torch.linalg.cholesky_ex(products + torch.diag_embed(damp.expand_as(diagonal)))
        if not wrong:
            upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not wrong:
                return upper
        damp = damp * 10
