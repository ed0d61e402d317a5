"""The product with the vocabulary and its cross-entropy in parts, so that the logits are never whole in memory.

Shapes: N tokens, V vocabulary. The whole of the logits, their softmax and its gradient would be 12 N V bytes: 3.2 GB
for 2048 tokens of 128,256 words. Here a part of the rows is worked through at a time, gradient and all, as in Liger
Kernel (arXiv:2410.10989): the forward pass leaves the gradients of its inputs behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oneblock.constants import LOSS_CHUNK_BYTES
from oneblock.model import Decoder
from oneblock.parallel.pipeline import RemoteParameter

FAST = 2 << 20  # bytes of logits that are worked on at once on a CPU: they stay in its caches
WORDS = 4096  # rows of the weight's gradient that are added to at once: what is added is never whole either


@dataclass(frozen=True)
class Head:
    """What lies between the last norm and the loss, beside the weights."""

    scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    ignore: int = -100


def cross_entropy(model: Decoder, x: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """What to minimise, and the cross-entropy in it: means over the targets, of x (B, T, dim) and targets (B, T)."""
    if isinstance(model.head.weight, RemoteParameter):  # a later stage of the pipeline has it, and the targets
        nothing = 0 * x[:, :1, :1].float().sum()
        return nothing, nothing.detach()
    head = Head(model.spec.logit_scale, model.spec.logit_softcap, z_loss)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return FusedLinearCrossEntropy.apply(
            x.flatten(0, -2), model.head.weight, model.head.bias, targets.flatten(), head
        )


class FusedLinearCrossEntropy(torch.autograd.Function):
    """(N, dim), (V, dim), (V,) or None, (N,) -> the loss to minimise and the cross-entropy alone, both fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        grads = Gradients(x, weight, bias, ctx.needs_input_grad)
        count = (targets != head.ignore).sum().clamp(min=1)
        cast = weight.to(x.dtype)
        total, entropy = (torch.zeros((), device=x.device) for _ in range(2))
        rows = max(1, LOSS_CHUNK_BYTES // (cast.shape[0] * (4 + x.element_size())))
        room = x.new_empty(min(rows, len(x)), len(cast))  # for all parts: memory that comes fresh is slow
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = torch.mm(x[part], cast.T, out=room[: len(x[part])])
            if bias is not None:
                logits += bias.to(x.dtype)
            found, wrong = backward_through_softmax(logits, targets[part], head)
            total += found
            entropy += wrong
            grads.add(part, logits, cast)
        ctx.grads = grads.divided(count)
        ctx.mark_non_differentiable(entropy)
        return total / count, entropy / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.grads = ctx.grads, None  # handed over: whoever gets the last reference need not copy
        return (*(None if g is None else g.mul_(grads[0].to(g.dtype)) for g in found), None, None)


class Gradients:
    """Sums of the gradients of x, weight and bias; those that nobody needs are None."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]):
        self.rows, self.begun = x, False
        self.x = torch.empty_like(x) if needed[0] else None
        self.weight = torch.empty_like(weight) if needed[1] else None
        self.made = x.new_empty(WORDS, x.shape[1])  # in the products' dtype, and below in the weight's
        self.wide = self.made if weight.dtype == x.dtype else self.made.to(weight.dtype)
        self.bias = torch.zeros_like(bias) if bias is not None and needed[2] else None

    def add(self, part: slice, grad: Tensor, weight: Tensor) -> None:
        """`grad` (rows, V): of the logits of one part."""
        if self.x is not None:
            torch.mm(grad, weight, out=self.x[part])
        if self.weight is not None:
            for start in range(0, len(weight), WORDS):
                words = slice(start, start + WORDS)
                into = self.weight[words]
                made = torch.mm(grad[:, words].T, self.rows[part], out=self.made[: len(into)])
                if self.begun:
                    into += made if self.wide is self.made else self.wide[: len(into)].copy_(made)
                else:
                    into.copy_(made)
            self.begun = True
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)

    def divided(self, count: Tensor) -> list[Tensor | None]:
        return [None if g is None else g.div_(count.to(g.dtype)) for g in (self.x, self.weight, self.bias)]


def backward_through_softmax(logits: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Sums of the loss and of the cross-entropy over the rows of logits (N, V), which become their own gradient."""
    rows = max(1, FAST // (4 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)
    sums = torch.zeros(2, device=logits.device)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        sums += one_softmax(logits[part], targets[part], head)
    return sums[0], sums[1]


def one_softmax(logits: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The two sums of a few rows; each number is raised to a power of e once."""
    y = logits.float()
    if head.scale != 1.0:
        y = y * head.scale
    slope = None
    if head.softcap is not None:
        y = torch.tanh(y / head.softcap)
        slope = 1 - y.square()
        y = y * head.softcap
    valid = (targets != head.ignore)[:, None]
    target = targets.clamp(min=0)[:, None]
    chosen, largest = y.gather(-1, target), y.amax(-1, keepdim=True)
    total = y.sub_(largest).exp_().sum(-1, keepdim=True)
    log_sum = total.log() + largest
    entropy = ((log_sum - chosen) * valid).sum()
    z = (log_sum.square() * valid).sum() * head.z_loss if head.z_loss else 0.0
    # d entropy / d y = softmax - one at the target; d z / d y = 2 z_loss log_sum softmax
    share = valid * head.scale
    grad = y.mul_(share * (1 + 2 * head.z_loss * log_sum) / total)
    grad.scatter_add_(-1, target, -share.to(grad.dtype))
    logits.copy_(grad if slope is None else grad.mul_(slope))
    return torch.stack((entropy + z, entropy))
