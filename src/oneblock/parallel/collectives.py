"""Collectives that autograd passes through: the backward pass of each is another collective."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Op = Callable[[Tensor], Tensor]
Group = dist.ProcessGroup | None  # None: all ranks


class Collective(torch.autograd.Function):
    """`op(x)` in the forward pass, `adjoint(grad)` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Op, adjoint: Op) -> Tensor:
        ctx.adjoint = adjoint
        return op(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grads[0]), None, None


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Concatenate every rank's x along `dim`; the gradient is reduce-scattered."""
    return Collective.apply(x, partial(_all_gather, group, dim), partial(_reduce_scatter, group, dim))


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return this rank's chunk along `dim` of the sum over ranks; the gradient is all-gathered."""
    return Collective.apply(x, partial(_reduce_scatter, group, dim), partial(_all_gather, group, dim))


def _all_gather(group: Group, dim: int, x: Tensor) -> Tensor:
    chunks = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(chunks, x.contiguous(), group=group)
    return torch.cat(chunks, dim)


def _reduce_scatter(group: Group, dim: int, x: Tensor) -> Tensor:
    chunks = [chunk.contiguous() for chunk in x.chunk(dist.get_world_size(group), dim)]
    out = torch.empty_like(chunks[0])
    dist.reduce_scatter(out, chunks, group=group)
    return out


def all_to_all(x: Tensor, send_counts: list[int], recv_counts: list[int], group: Group) -> Tensor:
    """Send `send_counts[r]` rows of x (N, ..) to each rank r and receive `recv_counts[r]` from it; gradients return."""
    op = partial(_all_to_all, group, send_counts, recv_counts)
    return Collective.apply(x, op, partial(_all_to_all, group, recv_counts, send_counts))


def _all_to_all(group: Group, send_counts: list[int], recv_counts: list[int], x: Tensor) -> Tensor:
    out = x.new_empty(sum(recv_counts), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), recv_counts, send_counts, group=group)
    return out


def send(x: Tensor, peer: int) -> Tensor:
    """Send x to rank `peer` and return a copy, whose gradient is received from `peer`."""
    return Collective.apply(x, lambda x: _send(x, peer).clone(), lambda grad: _recv(grad, peer))


def recv(like: Tensor, peer: int) -> Tensor:
    """Receive a tensor of `like`'s shape and dtype from rank `peer`; its gradient is sent back."""
    root = torch.zeros_like(like[:0], requires_grad=True)  # makes autograd run the backward pass, which ends there
    return Collective.apply(root, lambda _: _recv(like, peer), lambda grad: _send(grad, peer)[:0])


def _send(x: Tensor, peer: int) -> Tensor:
    dist.send(x.contiguous(), peer)
    return x


def _recv(like: Tensor, peer: int) -> Tensor:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(out, peer)
    return out
