"""Linear layers: one protocol for plain, skinny-GEMM, quantized, sharded and adapted ones.

A linear layer is a module with `in_features`, `out_features` and a `forward` from (.., in_features) to
(.., out_features). Nothing more is needed: a layer that declares nothing else, such as a LoRA wrapper, is always
called. A class may also declare, and a subclass must declare anew:

    kernel_weight   its layers go through the C++ GEMM, fused with others of the same class and format
    slice           its rows or columns can be split over tensor-parallel ranks
    dequantize      its weights in fp32
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.kernels.build import can_use_kernels

T = TypeVar("T", bound=type[nn.Module])

MAX_ROWS = 16  # rows of x up to which the bf16 kernel is faster than torch's GEMM
ROWS, COLUMNS = 0, 1  # dimensions of a weight matrix (out_features, in_features)


# One weight matrix as the C++ GEMM takes it: format, bf16 weight or qweight, scale, int4 group parameters, bias, rows,
# columns whose activations share a scale. Matrices of one format can be fused. A plain tuple: built in every step.
KernelWeight = tuple[Hashable, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]


class KernelLinear(Protocol):
    """A linear layer whose class declares the C++ GEMM."""

    max_rows: ClassVar[float]  # rows of x up to which the kernel is the faster one
    in_features: int
    out_features: int

    def kernel_weight(self) -> KernelWeight | None:
        """The GEMM's operands; None if this layer cannot use the kernel."""
        ...


def uses_gemm_kernel(cls: T) -> T:
    """Declare that instances of exactly this class may go through the C++ GEMM instead of being called."""
    cls.kernel_class = cls  # type: ignore[attr-defined]
    return cls


def is_unmodified(*modules: nn.Module) -> bool:
    """Whether calling these modules does no more than their class says: no forward hooks, no patched `forward`."""
    for m in modules:  # noqa: SIM110 - faster than a generator, in every decode step
        if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
            return False
    return True


def kernel_args(*layers: nn.Module) -> tuple[list[Any], ...] | None:
    """The operands of layers that one kernel may compute, else None: each class must declare it, none may have hooks.

    Runs in every decode step, so it reads each layer once.
    """
    kind = type(layers[0])
    if getattr(kind, "kernel_class", None) is not kind or not is_unmodified(*layers):
        return None
    return pack_weights([cast(KernelLinear, x).kernel_weight() if type(x) is kind else None for x in layers])


def pack_weights(weights: Sequence[KernelWeight | None]) -> tuple[list[Any], ...] | None:
    """Weights of one format as the operators take them: weights, scales, group params, biases, rows, group sizes."""
    if None in weights:
        return None
    formats, *operands, rows, group_sizes = zip(*cast("Sequence[KernelWeight]", weights), strict=True)
    if any(f != formats[0] for f in formats):
        return None
    return *([] if x[0] is None else list(x) for x in operands), list(rows), list(group_sizes)


def can_fuse(*layers: nn.Module) -> bool:
    """Whether one kernel may compute all these layers."""
    return kernel_args(*layers) is not None


def fused_linear(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Apply each layer to x (.., in_features): in one kernel if all can be fused, otherwise by calling each."""
    args = kernel_args(*layers) if can_use_kernels(x) else None
    if args is None or not fits_kernel(cast(KernelLinear, layers[0]), x):
        return [layer(x) for layer in layers]
    return linear_kernel(x, args).split_with_sizes(args[4], -1)  # `split` costs a Python call


def forward_with_kernel(layer: KernelLinear, x: Tensor) -> Tensor | None:
    """One layer's output by the C++ GEMM; None if it or x cannot use it."""
    args = pack_weights([layer.kernel_weight()]) if can_use_kernels(x) and fits_kernel(layer, x) else None
    return None if args is None else linear_kernel(x, args)


def fits_kernel(layer: KernelLinear, x: Tensor) -> bool:
    """Whether x (.., in_features) has the layer's size, and few enough rows for the kernel to be the faster one."""
    columns = x.shape[-1]
    return columns == layer.in_features and x.numel() <= layer.max_rows * columns


def linear_kernel(x: Tensor, args: tuple[list[Any], ...]) -> Tensor:
    return torch.ops.oneblock_cpu.linear(x.contiguous(), *args).view(*x.shape[:-1], -1)


def is_bf16(x: Tensor) -> bool:
    """Whether a kernel may read x by its data pointer."""
    return x.dtype == torch.bfloat16 and x.is_contiguous()


@uses_gemm_kernel
class SkinnyGemmLinear(nn.Linear):
    """nn.Linear that multiplies up to MAX_ROWS rows at memory bandwidth, on CPUs in bf16."""

    max_rows: ClassVar[float] = MAX_ROWS

    def forward(self, input: Tensor) -> Tensor:
        y = forward_with_kernel(self, input)
        return F.linear(input, self.weight, self.bias) if y is None else y

    def kernel_weight(self) -> KernelWeight | None:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if weight is None or not is_bf16(weight) or not (bias is None or is_bf16(bias)):
            return None
        return (bias is None, weight, None, None, bias, self.out_features, 0)


def slice_linear(layer: nn.Module, dim: int, part: slice) -> nn.Module:
    """Copy some ROWS (outputs, with their bias) or COLUMNS (inputs, with the whole bias) as the same kind of layer."""
    if type(layer) in (nn.Linear, SkinnyGemmLinear):
        linear = cast(nn.Linear, layer)
        weight = linear.weight[part] if dim == ROWS else linear.weight[:, part]
        with torch.device("meta"):
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        new.weight = frozen_copy(weight)
        new.bias = slice_bias(linear.bias, dim, part)  # type: ignore[assignment]
        return new
    if "slice" not in vars(type(layer)):
        raise OneblockError(
            f"a {type(layer).__name__} cannot be sliced for tensor parallelism: shard before wrapping it"
        )
    return cast(Any, layer).slice(dim, part)


def slice_bias(bias: Tensor | None, dim: int, part: slice) -> nn.Parameter | None:
    return None if bias is None else frozen_copy(bias[part] if dim == ROWS else bias)


def frozen_copy(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().clone(), requires_grad=False)
