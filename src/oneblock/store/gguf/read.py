"""A GGUF file to a model and its tokenizer: sizes are checked against the file before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.spec import Spec
from oneblock.store import load as loading
from oneblock.store.config import family_of
from oneblock.store.gguf.architectures import FREQS, LONG, SHORT, map_gguf_tensors
from oneblock.store.gguf.config import read_architecture, read_config
from oneblock.store.gguf.header import Header, read_header
from oneblock.store.gguf.tokenizer import eos_ids, read_tokenizer
from oneblock.store.name_tables import Shape
from oneblock.store.tensors import DOWNLOAD_AGAIN, TensorReader
from oneblock.text import Tokenizer

IGNORED = (FREQS, LONG, SHORT, ".attn_rot_embd.weight")
BLOCK_CODES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
CODES = ("F32", "F16", "BF16", *BLOCK_CODES)


def load_gguf(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[loading.Checkpoint, Tokenizer | None]:
    """Load the model of a file, its weights in `dtype`, and its tokenizer if it has one.

    None: the dtype of most weights; block-quantized ones count as bfloat16. Tensors are memory-mapped when layouts
    match, otherwise copied in chunks. OneblockError if the file is not a complete, undamaged model.
    """
    path, on = Path(path), loading.check_device(device)
    header = read_header(path)
    try:
        if header.metadata.get("split.count", 1) not in (0, 1):
            raise OneblockError("is one of several parts; join them first (llama-gguf-split --merge)")
        spec, config = _read_spec(header)
        model = loading.build_on_meta(spec)
        arch = read_architecture(header.metadata)
        disk_tensors = map_gguf_tensors(arch, family_of(config), spec, loading.parameter_shapes(model))
        tokenizer = read_tokenizer(header.metadata, spec.vocab)
    except OneblockError as error:
        raise OneblockError(f"{path}: {error}") from error
    loading.check_tensors(path, disk_tensors, header.tensors, CODES, lambda name: name.endswith(IGNORED))
    target = loading.choose_dtype(dtype, disk_tensors, header.tensors)
    loading.fill_model(model, disk_tensors, header.tensors, target, on)
    config |= {"bos_token_id": tokenizer.bos_id if tokenizer else None, "eos_token_id": eos_ids(header.metadata)}
    return loading.Checkpoint(model, spec, config), tokenizer


def _read_spec(header: Header) -> tuple[Spec, dict[str, Any]]:
    shapes = {name: info.shape for name, info in header.tensors.items()}
    try:
        config = read_config(header.metadata, shapes, _read_rope_divisors(header))
        _check_depth(shapes, config)
        return family_of(config).config.read(config), config
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:100]
        raise OneblockError(f"has metadata that describes no model ({reason}); {DOWNLOAD_AGAIN}") from error


def _read_rope_divisors(header: Header) -> dict[str, Tensor]:
    """The divisors of the RoPE frequencies, which are part of the configuration."""
    divisors = {}
    for info in (header.tensors[name] for name in (FREQS, LONG, SHORT) if name in header.tensors):
        if info.dtype != "F32" or len(info.shape) != 1 or info.shape[0] > 1 << 12:
            raise OneblockError(f"tensor {info.name!r} is not a vector of F32 numbers; {DOWNLOAD_AGAIN}")
        with TensorReader(info) as reader:
            divisors[info.name] = reader.read(info.shape, 0)
    return divisors


def _check_depth(shapes: Mapping[str, Shape], config: dict[str, Any]) -> None:
    """Compare sizes with the tensors before a model of those sizes is built."""
    if "token_embd.weight" not in shapes:
        raise OneblockError(f"tensor 'token_embd.weight' is missing; {DOWNLOAD_AGAIN}")
    depth = config.get("num_hidden_layers") or config["n_layer"]
    if depth > len(shapes):
        raise OneblockError(f"announces {depth} layers and has {len(shapes)} tensors; {DOWNLOAD_AGAIN}")
