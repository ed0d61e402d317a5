"""Linear layers: one protocol for plain, skinny-GEMM, quantized, sharded and adapted ones.

A linear layer is a module with `in_features`, `out_features` and a `forward` from (.., in_features) to
(.., out_features). Nothing more is needed: a layer that declares nothing else, such as a LoRA wrapper, is always
called. A class may also declare, and a subclass must declare anew:

    fusion_key, kernel_weight   its layers go through the C++ GEMM, fused with others of the same class and key
    slice                       its rows or columns can be split over tensor-parallel ranks
    dequantize                  its weights in fp32
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.kernels.build import can_use_kernels

T = TypeVar("T", bound=type[nn.Module])

MAX_ROWS = 16  # rows of x up to which the bf16 kernel is faster than torch's GEMM
ROWS, COLUMNS = 0, 1  # dimensions of a weight matrix (out_features, in_features)


class KernelWeight(NamedTuple):
    """One weight matrix as the C++ GEMM takes it: bf16, or qweight with scales and, for int4, group parameters."""

    weight: Tensor
    scale: Tensor | None = None
    group_params: Tensor | None = None
    group_size: int = 0  # columns whose activations share a scale


class KernelLinear(Protocol):
    """A linear layer whose class declares the C++ GEMM."""

    kernel_class: ClassVar[type[Any]]  # the declaring class itself, set by `uses_gemm_kernel`
    max_rows: ClassVar[float]  # rows of x up to which the kernel is the faster one
    in_features: int
    out_features: int
    bias: Tensor | None

    def fusion_key(self) -> Hashable | None:
        """Layers of one class with equal keys can be fused; None: this layer cannot use the kernel now."""
        ...

    def kernel_weight(self) -> KernelWeight: ...


def uses_gemm_kernel(cls: T) -> T:
    """Declare that instances of exactly this class may go through the C++ GEMM instead of being called."""
    cls.kernel_class = cls  # type: ignore[attr-defined]
    return cls


def is_unmodified(*modules: nn.Module) -> bool:
    """Whether calling these modules does no more than their class says: no forward hooks, no patched `forward`."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def can_fuse(*layers: nn.Module) -> bool:
    """Whether one kernel may compute all these layers: each declares it, all have one class and key, none has hooks."""
    kind = type(layers[0])
    if getattr(kind, "kernel_class", None) is not kind:
        return False
    key = cast(KernelLinear, layers[0]).fusion_key()
    return key is not None and all(
        type(x) is kind and cast(KernelLinear, x).fusion_key() == key and is_unmodified(x) for x in layers
    )


def fits_kernel(layer: KernelLinear, x: Tensor) -> bool:
    """Whether the kernel accepts x (.., in_features) and is faster than torch for so many rows."""
    columns = x.shape[-1]
    return can_use_kernels(x) and columns == layer.in_features and x.numel() <= layer.max_rows * columns


def fused_linear(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Apply each layer to x (.., in_features): in one kernel if all can be fused, otherwise by calling each."""
    if can_fuse(*layers) and fits_kernel(cast(KernelLinear, layers[0]), x):
        return linear_kernel(x, *cast(Sequence[KernelLinear], layers))
    return [layer(x) for layer in layers]


def linear_kernel(x: Tensor, *layers: KernelLinear) -> Sequence[Tensor]:
    """Each layer's output from one call of the C++ GEMM."""
    y = torch.ops.oneblock_cpu.linear(x.contiguous(), *kernel_args(layers)).view(*x.shape[:-1], -1)
    return y.split([layer.out_features for layer in layers], -1) if len(layers) > 1 else (y,)


def kernel_args(layers: Sequence[KernelLinear]) -> tuple[list[Any], ...]:
    """Fusable layers as the operators take them: weights, scales, group parameters, biases, rows, group sizes."""
    weights = [layer.kernel_weight() for layer in layers]
    return (
        [w.weight for w in weights],
        [w.scale for w in weights if w.scale is not None],
        [w.group_params for w in weights if w.group_params is not None],
        [layer.bias for layer in layers if layer.bias is not None],
        [layer.out_features for layer in layers],
        [w.group_size for w in weights],
    )


@uses_gemm_kernel
class SkinnyGemmLinear(nn.Linear):
    """nn.Linear that multiplies up to MAX_ROWS rows at memory bandwidth, on CPUs in bf16."""

    max_rows: ClassVar[float] = MAX_ROWS

    def forward(self, input: Tensor) -> Tensor:
        if self.fusion_key() is not None and fits_kernel(self, input):  # type: ignore[arg-type]
            return linear_kernel(input, self)[0]  # type: ignore[arg-type]
        return F.linear(input, self.weight, self.bias)

    def fusion_key(self) -> Hashable | None:
        bias = cast("Tensor | None", self.bias)
        if self.weight.dtype != torch.bfloat16 or not self.weight.is_contiguous():
            return None
        return None if bias is not None and bias.dtype != torch.bfloat16 else (bias is None,)

    def kernel_weight(self) -> KernelWeight:
        return KernelWeight(self.weight)


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
