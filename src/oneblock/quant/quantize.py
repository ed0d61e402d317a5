"""Quantizing a finished model, in place: which matrices, in which format, and which stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.kernels.substitution import replace_module
from oneblock.model import Decoder
from oneblock.model.mlp import Experts
from oneblock.quant.formats import quantize_float8, quantize_int4, quantize_int8
from oneblock.quant.linear import Float8Linear, QuantizedLinear
from oneblock.quant.modules import QuantizedEmbedding, QuantizedExperts, QuantizedLayer

ROUTING = ("router", "shared_gate")  # small, and a wrong choice of expert costs more than their bytes
INT8_COLUMNS = 16  # in_features of int8 and fp8 layers are a multiple of this


@dataclass(frozen=True)
class QuantConfig:
    """A weight format. `group`: columns that share int4 parameters."""

    bits: int = 8
    group: int = 64
    fp8: bool = False

    def __post_init__(self) -> None:
        if self.fp8 and self.bits != 8:
            raise OneblockError(f"fp8 with {self.bits} bits: fp8 has 8 bits; leave out --bits or --fp8")
        if self.bits not in (8, 4):
            raise OneblockError(f"weights in {self.bits} bits: choose 8 or 4")
        if self.bits == 4 and self.group not in (32, 64, 128):
            raise OneblockError(f"int4 groups of {self.group} columns: choose 32, 64 or 128")

    def __str__(self) -> str:
        return "fp8" if self.fp8 else "int8" if self.bits == 8 else f"int4, group {self.group}"

    @property
    def divisor(self) -> int:
        """The number that in_features of a matrix must be a multiple of."""
        return self.group if self.bits == 4 else INT8_COLUMNS


SetWeight = Callable[[str, QuantizedLayer, Tensor], None]  # quantize the weights (N, K) of this name into this layer


def round_to_nearest(name: str, layer: QuantizedLayer, weight: Tensor) -> None:
    """Round each weight to the nearest quantized value."""
    if isinstance(layer, Float8Linear):
        layer.qweight, layer.scale = quantize_float8(weight)
    elif layer.group:
        layer.set_weight(*quantize_int4(weight, layer.group))
    else:
        layer.set_weight(*quantize_int8(weight))


def quantize(model: Decoder, config: QuantConfig) -> Decoder:
    """Quantize the blocks' matrices and the LM head in place; embeddings, norms, biases, routers stay as they are."""
    check_quantizable(model, config)
    replace_linears(model, config, round_to_nearest)
    return tie_embedding(model)


def check_quantizable(model: Decoder, config: QuantConfig) -> None:
    """OneblockError if the model is quantized already, or no matrix fits the format."""
    if present := quant_config(model):
        raise OneblockError(f"the model's weights are already {present}; quantize the original model")
    stays = unquantized(model, config)
    if not any(name not in stays for name, _ in matrices(model)):
        reasons = sorted({reason for name, reason in stays.items() if not name.endswith(ROUTING)})
        raise OneblockError(
            f"{config} fits no matrix of the model ({'; '.join(reasons)}); use a smaller group or 8 bits"
        )


def matrices(root: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Name and in_features of every plain linear layer and every expert layer."""
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear):
            yield name, [module.in_features]
        if isinstance(module, Experts):
            yield name, [module.up.shape[-1], module.down.shape[-1]]


def unquantized(root: nn.Module, config: QuantConfig) -> dict[str, str]:
    """The plain matrices that this format leaves as they are, with the reason."""
    reasons = {}
    for name, sizes in matrices(root):
        odd = next((n for n in sizes if n % config.divisor), None)
        if name.endswith(ROUTING):
            reasons[name] = "routing stays in full precision"
        elif odd is not None:
            reasons[name] = f"in_features {odd} is not divisible by {config.divisor}"
    return reasons


def replace_linears(root: nn.Module, config: QuantConfig, set_weight: SetWeight) -> None:
    """Replace plain layers by quantized ones, one at a time, so that never both forms of the whole model are held."""
    stays = unquantized(root, config)

    def quantize_matrix(name: str, weight: Tensor, bias: Tensor | None) -> QuantizedLayer:
        with weight.device:
            rows, columns = weight.shape
            group = config.group if config.bits == 4 else 0
            new = Float8Linear(rows, columns, bias) if config.fp8 else QuantizedLinear(rows, columns, group, bias)
        set_weight(name, new, weight.detach())
        return new

    for name, module in list(root.named_modules()):
        if isinstance(module, nn.Linear) and name not in stays:
            replace_module(root, name, quantize_matrix(name, module.weight, module.bias))
        if isinstance(module, Experts) and name not in stays:
            experts = QuantizedExperts(module, lambda part, w, b, name=name: quantize_matrix(f"{name}.{part}", w, b))
            replace_module(root, name, experts)


def tie_embedding(model: Decoder) -> Decoder:
    """Let a tied embedding read the rows of the quantized LM head."""
    if model.spec.tied and isinstance(model.head, QuantizedLayer):
        replace_module(model, "embed", QuantizedEmbedding(model.head, model.embed.weight.dtype))
    return model


def quant_config(model: nn.Module) -> QuantConfig | None:
    """The format of a model's quantized matrices; None if there are none."""
    layer = next((m for m in model.modules() if isinstance(m, QuantizedLayer)), None)
    if isinstance(layer, Float8Linear):
        return QuantConfig(fp8=True)
    return None if layer is None else QuantConfig(layer.bits, layer.group or 64)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and quantized weights, a tied matrix counted once."""
    return sum(x.nbytes for x in weights(model).values())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and quantized tensors by name, a tied matrix once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
