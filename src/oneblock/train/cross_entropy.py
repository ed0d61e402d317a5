"""The LM-head projection in chunks of tokens: fused cross-entropy, and log-probabilities of given tokens.

Shapes: N tokens, D model dimension, V vocabulary. The full logits, their softmax and its gradient would take 12 N V
bytes: 3.2 GB for 2048 tokens and a vocabulary of 128,256. `FusedLinearCrossEntropy` computes the gradients in the
forward pass, as Liger Kernel does (arXiv:2410.10989); `token_logprobs` recomputes each chunk in the backward pass,
since a later function decides the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oneblock.constants import LOSS_CHUNK_BYTES
from oneblock.data.packed import IGNORE_INDEX
from oneblock.kernels.linear import SkinnyGemmLinear, is_unmodified
from oneblock.model import Decoder
from oneblock.parallel.pipeline import RemoteParameter

CACHE_CHUNK = 2 << 20  # bytes of logits per softmax on a CPU, so that they stay in its caches
VOCAB_CHUNK = 4096  # vocabulary rows per update of the head's gradient, whose full increment is never stored


@dataclass(frozen=True)
class LogitTransform:
    """The step from the output of the LM head to logits: softcap(scale * y) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits in fp32, and the derivative of the soft cap."""
        y = y.float() * self.scale if self.scale != 1.0 else y.float()
        slope = None
        if self.softcap is not None:
            y = torch.tanh(y / self.softcap)
            slope = 1 - y.square()
            y = y * self.softcap
        return (y / self.temperature if self.temperature != 1.0 else y), slope

    @property
    def factor(self) -> float:
        """The derivative, but for that of the soft cap."""
        return self.scale / self.temperature


def cross_entropy(
    model: Decoder, x: Tensor, targets: Tensor, z_loss: float = 0.0, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss with its z-loss, and the cross-entropy alone: means over the targets of x (B, T, D), targets (B, T).

    `weights` (B, T) makes them weighted means. A head that is not a plain linear layer is called.
    """
    head, spec = model.head, model.spec
    if isinstance(getattr(head, "weight", None), RemoteParameter):  # the last pipeline stage has it, and the targets
        zero = 0 * x[:, :1, :1].float().sum()
        return zero, zero.detach()
    weights = (targets != IGNORE_INDEX).float() * (1.0 if weights is None else weights)
    transform = LogitTransform(spec.logit_scale, spec.logit_softcap)
    if not is_plain_linear(head):
        logprobs, log_sums = logprobs_and_log_sums(x, head, targets, transform)
        total = nonzero(weights.sum())
        entropy = -(weights * logprobs).sum() / total
        return entropy + z_loss * (weights * log_sums.square()).sum() / total, entropy.detach()
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return FusedLinearCrossEntropy.apply(
            x.flatten(0, -2), head.weight, head.bias, targets.flatten(), weights.flatten(), transform, z_loss
        )


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The log-probability of each target (B, T) under head(hidden), hidden (B, T, D): (B, T) in fp32.

    Differentiable by any later function of them, with respect to `hidden` and every parameter of `head`, which may be
    any linear layer. Logits are computed and recomputed in chunks of tokens. Ignored targets (-100) get 0.
    """
    return logprobs_and_log_sums(hidden, head, targets, LogitTransform(logit_scale, softcap, temperature))[0]


def logprobs_and_log_sums(
    hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and the log-sum-exp of the logits, both (B, T) in fp32."""
    params = [p for p in head.parameters() if p.requires_grad]
    outputs = ChunkedLogprobs.apply(hidden.flatten(0, -2), targets.flatten(), head, transform, *params)
    return outputs[0].view_as(targets), outputs[1].view_as(targets)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether the head is a matrix product and a bias, so that its weight may be read instead of calling it."""
    return type(head) in (nn.Linear, SkinnyGemmLinear) and is_unmodified(head)


def nonzero(total: Tensor) -> Tensor:
    """A sum of weights as a divisor: 1 where it is 0."""
    return torch.where(total == 0, torch.ones_like(total), total)


def chunks(length: int, vocab: int, element_size: int) -> Iterator[slice]:
    """Slices of tokens whose logits, with their fp32 copy, take at most LOSS_CHUNK_BYTES bytes."""
    rows = max(1, LOSS_CHUNK_BYTES // (vocab * (4 + element_size)))
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


# ------------------------------------------------------------------ log-probabilities


class ChunkedLogprobs(torch.autograd.Function):
    """(N, D), (N,), any linear layer -> log-probabilities and log-sum-exp, (N,) each; recomputed in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, targets, *params)
        ctx.vocab = getattr(head, "out_features", None) or head(x[:1]).shape[-1]
        ctx.head, ctx.transform, kind = head, transform, x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.rng = get_rng_states(x.device)  # an adapter may have dropout
        logprobs, log_sums = (x.new_zeros(len(x), dtype=torch.float32) for _ in range(2))
        for part in chunks(len(x), ctx.vocab, x.element_size()):
            logits, _ = transform.apply(head(x[part]))
            log_sums[part] = logits.logsumexp(-1)
            target = logits.gather(-1, targets[part].clamp(min=0)[:, None])[:, 0]
            logprobs[part] = (target - log_sums[part]) * (targets[part] != IGNORE_INDEX)
        return logprobs, log_sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, targets, *params = ctx.saved_tensors
        needs_x, head, transform = ctx.needs_input_grad[0], ctx.head, ctx.transform
        x_grad = torch.empty_like(x) if needs_x else None
        sums: list[Tensor | None] = [None] * len(params)
        kind, dtype, enabled = ctx.autocast
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([x.device] if kind == "cuda" else [], device_type=kind))
            set_rng_states(ctx.rng, x.device)
            # A cached cast of a weight would be part of the first chunk's graph, which is freed
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            for part in chunks(len(x), ctx.vocab, x.element_size()):
                with torch.enable_grad():
                    leaf = x[part].detach().requires_grad_(needs_x)
                    output = head(leaf)
                grad = logits_grad(output.detach(), targets[part], grads[0][part], grads[1][part], transform)
                inputs = [leaf, *params] if needs_x else params
                parts = list(torch.autograd.grad(output, inputs, grad.to(output.dtype), allow_unused=True))
                if x_grad is not None:
                    x_grad[part] = parts.pop(0)
                sums = [add_grad(a, b) for a, b in zip(sums, parts, strict=True)]
        return x_grad, None, None, None, *sums


def logits_grad(
    output: Tensor, targets: Tensor, logprob_grad: Tensor, log_sum_grad: Tensor, transform: LogitTransform
) -> Tensor:
    """The gradient of the head's output (n, V): g (onehot - softmax) for log-probabilities, h softmax for log-sums."""
    logits, slope = transform.apply(output)
    logprob_grad = logprob_grad * (targets != IGNORE_INDEX)
    logprob_grad, log_sum_grad = logprob_grad * transform.factor, log_sum_grad * transform.factor
    grad = logits.softmax(-1).mul_((log_sum_grad - logprob_grad)[:, None])
    grad.scatter_add_(-1, targets.clamp(min=0)[:, None], logprob_grad[:, None])
    return grad if slope is None else grad.mul_(slope)


def add_grad(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total.add_(grad)


def get_rng_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_rng_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


# ------------------------------------------------------------------ fused cross-entropy


class FusedLinearCrossEntropy(torch.autograd.Function):
    """x (N, D), weight (V, D), bias (V,) or None, targets and weights (N,) -> loss and cross-entropy, fp32 scalars."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        transform: LogitTransform,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        grads = HeadGradients(x, weight, bias, ctx.needs_input_grad)
        cast_weight, total = weight.to(x.dtype), nonzero(weights.sum())
        sums = torch.zeros(2, device=x.device)
        buffer = x.new_empty(0)  # for the logits of all chunks: fresh memory pages are slow
        for part in chunks(len(x), len(weight), x.element_size()):
            buffer = x.new_empty(len(x[part]), len(weight)) if not len(buffer) else buffer
            logits = torch.mm(x[part], cast_weight.T, out=buffer[: len(x[part])])
            if bias is not None:
                logits += bias.to(x.dtype)
            sums += logits_to_grad(logits, targets[part], weights[part], transform, z_loss)
            grads.add(part, logits, cast_weight)
        ctx.grads = grads.divide(total)
        loss, entropy = sums[0] / total, sums[1] / total
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        computed, ctx.grads = ctx.grads, None  # the receiver of the last reference need not copy
        return (*(None if g is None else g.mul_(grads[0].to(g.dtype)) for g in computed), None, None, None, None)


class HeadGradients:
    """Sums of the gradients of x, weight and bias; None where autograd does not need one."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]):
        self.rows, self.has_weight_grad = x, False
        self.x = torch.empty_like(x) if needed[0] else None
        self.weight = torch.empty_like(weight) if needed[1] else None
        self.product = x.new_empty(VOCAB_CHUNK, x.shape[1])
        self.product_as_weight = self.product if weight.dtype == x.dtype else self.product.to(weight.dtype)
        self.bias = torch.zeros_like(bias) if bias is not None and needed[2] else None

    def add(self, part: slice, grad: Tensor, weight: Tensor) -> None:
        """Add the contribution of one chunk, whose logits have the gradient `grad` (n, V)."""
        if self.x is not None:
            torch.mm(grad, weight, out=self.x[part])
        if self.weight is not None:
            for start in range(0, len(weight), VOCAB_CHUNK):
                columns = slice(start, start + VOCAB_CHUNK)
                total = self.weight[columns]
                product = torch.mm(grad[:, columns].T, self.rows[part], out=self.product[: len(total)])
                if not self.has_weight_grad:
                    total.copy_(product)
                elif self.product_as_weight is self.product:
                    total += product
                else:
                    total += self.product_as_weight[: len(total)].copy_(product)
            self.has_weight_grad = True
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)

    def divide(self, total: Tensor) -> list[Tensor | None]:
        return [None if g is None else g.div_(total.to(g.dtype)) for g in (self.x, self.weight, self.bias)]


def logits_to_grad(
    logits: Tensor, targets: Tensor, weights: Tensor, transform: LogitTransform, z_loss: float
) -> Tensor:
    """Replace logits (n, V) by their gradient; return the weighted sums of the loss and of the cross-entropy."""
    rows = max(1, CACHE_CHUNK // (4 * logits.shape[1])) if logits.device.type == "cpu" else max(1, len(logits))
    sums = torch.zeros(2, device=logits.device)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        sums += softmax_to_grad(logits[part], targets[part], weights[part][:, None], transform, z_loss)
    return sums


def softmax_to_grad(
    logits: Tensor, targets: Tensor, weights: Tensor, transform: LogitTransform, z_loss: float
) -> Tensor:
    """`logits_to_grad` for a few rows; each logit is exponentiated once."""
    y, slope = transform.apply(logits)
    target = targets.clamp(min=0)[:, None]
    target_logit, largest = y.gather(-1, target), y.amax(-1, keepdim=True)
    total = y.sub_(largest).exp_().sum(-1, keepdim=True)
    log_sum = total.log() + largest
    entropy = ((log_sum - target_logit) * weights).sum()
    z = (log_sum.square() * weights).sum() * z_loss if z_loss else 0.0
    # d entropy / d logits = softmax - onehot; d z / d logits = 2 z_loss log_sum softmax
    share = weights * transform.factor
    grad = y.mul_(share * (1 + 2 * z_loss * log_sum) / total)
    grad.scatter_add_(-1, target, -share)
    logits.copy_(grad if slope is None else grad.mul_(slope))
    return torch.stack((entropy + z, entropy))
