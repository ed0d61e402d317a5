"""A model's matrices in 8 or 4 bits: made from a finished model, saved as a folder, loaded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.model.mlp import Experts, activate
from oneblock.quant.formats import quantize_float8, quantize_int4, quantize_int8
from oneblock.quant.linear import Float8Linear, QuantizedLinear
from oneblock.store.config import QUANTIZED, read_config, write_config
from oneblock.store.load import SINGLE, Checkpoint, as_dtype, build_on_meta, put, read_generation_config
from oneblock.store.save import write_config_files, write_tensors

EXACT = ("router", "shared_gate")  # small, and a wrong choice of expert costs more than their bytes


@dataclass(frozen=True)
class QuantConfig:
    """How many; and of 4 bits, of how many columns each group is that has a range of its own."""

    bits: int = 8
    group: int = 64
    fp8: bool = False  # 8 bits as floats, not as whole numbers

    def __post_init__(self) -> None:
        if self.fp8 and self.bits != 8:
            raise OneblockError(f"floats in {self.bits} bits: there are only those of 8")
        if self.bits not in (8, 4):
            raise OneblockError(f"weights in {self.bits} bits: choose 8 or 4")
        if self.bits == 4 and self.group not in (32, 64, 128):
            raise OneblockError(f"groups of {self.group}: choose 32, 64 or 128")


Codes = QuantizedLinear | Float8Linear
Fill = Callable[[str, Codes, Tensor], None]  # give a coded layer of this name the codes of these weights (N, K)


def nearest(name: str, layer: Codes, weight: Tensor) -> None:
    """Each number to the nearest code."""
    if isinstance(layer, Float8Linear):
        layer.codes, layer.scale = quantize_float8(weight)
    elif layer.group:
        layer.fill(*quantize_int4(weight, layer.group))
    else:
        layer.fill(*quantize_int8(weight))


class QuantizedEmbedding(nn.Module):
    """Rows of the output matrix as input embeddings, where the two are one."""

    def __init__(self, head: Codes, like: Tensor):
        super().__init__()
        self.head, self.dtype = [head], like.dtype  # in a list: it is not a module of this one's own

    def forward(self, ids: Tensor) -> Tensor:
        return self.head[0].rows(ids.flatten()).view(*ids.shape, -1).to(self.dtype)


class QuantizedExperts(nn.Module):
    """`Experts`, each a list of coded matrices."""

    def __init__(self, experts: Experts, make: Callable[[str, Tensor, Tensor | None], Codes]):
        super().__init__()
        self.spec, self.n_experts = experts.spec, experts.n_experts

        def each(name: str) -> nn.ModuleList | None:
            weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias")
            if weight is None:
                return None
            return nn.ModuleList(
                make(f"{name}.{e}", w, None if bias is None else bias[e]) for e, w in enumerate(weight)
            )

        self.gate, self.up, self.down = each("gate"), each("up"), each("down")

    def forward(self, x: Tensor, expert: Tensor, dropout: float = 0.0) -> Tensor:
        """Each row of x (N, dim), sorted by its expert (N,), through that expert: (N, dim)."""
        assert self.up is not None
        assert self.down is not None
        counts = torch.bincount(expert, minlength=self.n_experts).tolist()
        parts = []
        for e, rows in enumerate(x.split(counts)):
            if len(rows):
                gate = None if self.gate is None else self.gate[e](rows)
                h = activate(self.spec, self.up[e](rows), gate)
                parts.append(self.down[e](F.dropout(h, dropout) if dropout else h))
        return torch.cat(parts)


def quantize(model: Decoder, bits: QuantConfig) -> Decoder:
    """In place: matrices of the blocks and the head become codes; embeddings, norms, biases and routers stay.

    A matrix whose columns no group divides stays, too.
    """
    replace(model, bits, nearest)
    return share_head(model)


def replace(root: nn.Module, bits: QuantConfig, fill: Fill) -> None:
    """Put coded layers in the place of plain ones, one after another, so that both are never held whole."""
    group = bits.group if bits.bits == 4 else 0

    def coded(name: str, weight: Tensor, bias: Tensor | None) -> Codes:
        with weight.device:
            n, k = weight.shape
            new = Float8Linear(n, k, bias) if bits.fp8 else QuantizedLinear(n, k, group, bias)
        fill(name, new, weight.detach())
        return new

    for name, module in list(root.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(EXACT) and fits(module.weight, group):
            put(root, name, coded(name, module.weight, module.bias))
        if isinstance(module, Experts) and fits(module.up[0], group) and fits(module.down[0], group):
            put(root, name, QuantizedExperts(module, lambda part, w, b, of=name: coded(f"{of}.{part}", w, b)))


def share_head(model: Decoder) -> Decoder:
    """Where the output matrix is the embedding, words are read from its codes."""
    if model.spec.tied and isinstance(model.head, Codes):
        model.embed = cast(Any, QuantizedEmbedding(model.head, model.embed.weight))
    return model


def fits(weight: Tensor, group: int) -> bool:
    return weight.shape[1] % (group or 16) == 0


# ------------------------------------------------------------------ folders


def quantized(config: Mapping[str, Any]) -> QuantConfig | None:
    """What a config.json says of its folder's codes; None where its weights are plain."""
    found = config.get("quantization_config") or {}
    if found.get("quant_method") != QUANTIZED:
        return None
    return QuantConfig(found.get("bits", 8), found.get("group", 64), found.get("fp8", False))


def bits_of(model: Decoder) -> QuantConfig | None:
    """How a model's matrices are held; None: plain."""
    found = next((m for m in model.modules() if isinstance(m, Codes)), None)
    if isinstance(found, Float8Linear):
        return QuantConfig(fp8=True)
    return None if found is None else QuantConfig(found.bits, found.group or 64)


def write_quantized(
    folder: Path,
    model: Decoder,
    bits: QuantConfig,
    config: Mapping[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """The settings; and the weights, codes and scales under the model's own names."""
    write_tensors(folder / SINGLE, {name: x.contiguous() for name, x in tensors(model)}, {"format": "oneblock"})
    said = {"quantization_config": {"quant_method": QUANTIZED, **asdict(bits)}}
    write_config_files(folder, model, {**(config or write_config(model.spec)), **said}, generation)


def weight_bytes(model: Decoder) -> int:
    """What its weights, codes and scales take."""
    return sum(x.nbytes for _, x in tensors(model))


def tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Parameters and codes, a tied matrix once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def load_quantized(
    folder: Path, bits: QuantConfig, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """The model of a folder that `write_quantized` made. OneblockError names what is missing, or of another size."""
    spec, config = read_config(folder)
    model, path = build_on_meta(spec), folder / SINGLE
    wanted = as_dtype(dtype) if dtype else None
    with torch.device("meta"):
        replace(model, bits, lambda name, coded, weight: None)
    share_head(model)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            fill(model, path, {name: file.get_tensor(name) for name in file.keys()}, wanted)  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise OneblockError(f"{path}: {str(e).splitlines()[0]}; quantize the model again") from None
    if isinstance(model.embed, QuantizedEmbedding):
        model.embed.dtype = model.dtype
    return Checkpoint(model, spec, config, read_generation_config(folder))


def fill(model: Decoder, path: Path, stored: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    wanted = dict(tensors(model))
    strange = wanted.keys() ^ stored.keys()
    if strange:
        name = min(strange)
        said = "is missing" if name in wanted else "has no place in this model"
        raise OneblockError(f"{path}: tensor {name!r} {said}: quantize the model again")
    for name, like in wanted.items():
        x = stored[name]
        if x.shape != like.shape:
            said = f"has shape {list(x.shape)}, not {list(like.shape)}"
            raise OneblockError(f"{path}: tensor {name!r} {said}: quantize the model again")
        if x.dtype != like.dtype and not isinstance(like, nn.Parameter):
            raise OneblockError(f"{path}: tensor {name!r} is {x.dtype}, not {like.dtype}: quantize the model again")
        if isinstance(like, nn.Parameter):
            x = nn.Parameter(x.to(dtype) if dtype else x, requires_grad=False)
        put(model, name, x)
