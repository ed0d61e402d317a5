"""Folders of quantized models: config.json with `quantization_config`, and tensors under the model's own names."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from oneblock.errors import OneblockError
from oneblock.kernels.substitution import set_tensor
from oneblock.model import Decoder
from oneblock.quant.modules import QuantizedEmbedding
from oneblock.quant.quantize import QuantConfig, replace_linears, tie_embedding, unquantized, weights
from oneblock.store.config import QUANTIZED, read_config
from oneblock.store.load import SINGLE, Checkpoint, as_dtype, build_on_meta, read_generation_config
from oneblock.store.save import complete_checkpoint, write_config_files, write_tensors

FORMAT = 2  # of the tensors' names and layouts
FIX = "quantize the original model again"


def stored_quant_config(folder: Path) -> QuantConfig | None:
    """The format of a folder's weights; None if they are not quantized. OneblockError for an older format."""
    section = read_config(folder)[1].get("quantization_config") or {}
    if section.get("quant_method") != QUANTIZED:
        return None
    if section.get("format") != FORMAT:
        version = section.get("format", 1)
        raise OneblockError(f"{folder}: its weights are in quantized format {version}, not {FORMAT}; {FIX}")
    return QuantConfig(section.get("bits", 8), section.get("group", 64), section.get("fp8", False))


def write_quantized(folder: Path, model: Decoder | Checkpoint, quant: QuantConfig) -> None:
    """Write weights and settings into an existing folder; `unquantized` in config.json says which matrices are not."""
    checkpoint = complete_checkpoint(model)
    model = checkpoint.model
    tensors = {name: x.contiguous() for name, x in weights(model).items()}
    write_tensors(folder / SINGLE, tensors, {"format": "oneblock"})
    section = {"quant_method": QUANTIZED, "format": FORMAT, **asdict(quant), "unquantized": unquantized(model, quant)}
    write_config_files(folder, replace(checkpoint, config={**checkpoint.config, "quantization_config": section}))


def load_quantized(
    folder: Path, quant: QuantConfig, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """The model of a folder that `write_quantized` wrote. OneblockError names a tensor that is missing or misshapen."""
    spec, config = read_config(folder)
    model, path = build_on_meta(spec), folder / SINGLE
    target = as_dtype(dtype) if dtype else None
    with torch.device("meta"):
        replace_linears(model, quant, lambda name, layer, weight: None)
    tie_embedding(model)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            fill(model, path, {name: file.get_tensor(name) for name in file.keys()}, target)  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise OneblockError(f"{path}: {str(e).splitlines()[0]}; {FIX}") from None
    if isinstance(model.embed, QuantizedEmbedding):
        model.embed.dtype = model.dtype
    return Checkpoint(model, spec, config, read_generation_config(folder))


def fill(model: Decoder, path: Path, stored: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Give the meta model its tensors."""
    expected = weights(model)
    for name in sorted(expected.keys() ^ stored.keys()):
        problem = "is missing" if name in expected else "has no place in this model"
        raise OneblockError(f"{path}: tensor {name!r} {problem}; {FIX}")
    for name, like in expected.items():
        x, is_parameter = stored[name], isinstance(like, nn.Parameter)
        if x.shape != like.shape:
            raise OneblockError(f"{path}: tensor {name!r} has shape {list(x.shape)}, not {list(like.shape)}; {FIX}")
        if x.dtype != like.dtype and not is_parameter:
            raise OneblockError(f"{path}: tensor {name!r} is {x.dtype}, not {like.dtype}; {FIX}")
        if is_parameter:
            x = nn.Parameter(x.to(dtype) if dtype else x, requires_grad=False)
        set_tensor(model, name, x)
