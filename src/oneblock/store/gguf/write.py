"""A model and its tokenizer to one GGUF file, as llama.cpp's converter writes it: tensor by tensor, rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.files import replace_file
from oneblock.model import Decoder
from oneblock.store.gguf.blocks import PLAIN, WRITTEN, encode, fits, size
from oneblock.store.gguf.config import write_settings
from oneblock.store.gguf.names import Place, places
from oneblock.store.gguf.read import SLAB, rows_of
from oneblock.store.gguf.vocabulary import write_tokenizer
from oneblock.store.load import Checkpoint, parameter_shapes
from oneblock.store.tensors import CODES
from oneblock.text import Tokenizer

FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}
FILE_TYPES |= {"Q8_0": LlamaFileType.MOSTLY_Q8_0, "Q4_0": LlamaFileType.MOSTLY_Q4_0}
VOCABULARY = ("token_embd.weight", "output.weight")


def save_gguf(
    path: str | Path,
    model: Decoder | Checkpoint,
    tokenizer: Tokenizer | None = None,
    type: str | None = None,
    name: str = "",
) -> None:
    """Write a model as one file. `type`: f32, f16, bf16, q8_0 or q4_0; None: as the model is.

    Vectors stay fp32; matrices whose rows are no whole blocks become f16; in a q4_0 file the vocabulary's are q8_0.
    The file is there when it is whole. OneblockError where GGUF has no place for the model, or the disk is full.
    """
    config = model.config if isinstance(model, Checkpoint) else {}
    model = model.model if isinstance(model, Checkpoint) else model
    path, kind = Path(path).expanduser(), _kind(model, type)
    arch, family, settings, factors = write_settings(model.spec, config.get("model_type"))
    found = places(arch, family, model.spec, parameter_shapes(model))
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    settings |= {"general.name": name or path.stem, "general.type": "model", "general.file_type": int(FILE_TYPES[kind])}
    settings |= {"general.quantization_version": GGML_QUANT_VERSION}
    settings |= write_tokenizer(tokenizer, model.spec.vocab)
    with replace_file(path) as new:
        writer = GGUFWriter(new, arch)
        try:
            _write_header(writer, settings, found, factors, kind)
            _write_tensors(writer, found, factors, tensors, kind)
        finally:
            writer.close()


def _kind(model: Decoder, type: str | None) -> str:
    if type is None:
        code = CODES.get(model.embed.weight.dtype, "")
        return code if code in PLAIN else "F32"
    if type not in WRITTEN:
        raise OneblockError(f"type {type!r} is not known: choose one of {', '.join(WRITTEN)}")
    return WRITTEN[type]


def stored_as(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of one tensor in a file of a type."""
    if len(shape) == 1 or name.startswith("position_embd") or ".ffn_gate_inp." in name:  # the router
        return "F32"
    if kind == "Q4_0" and name in VOCABULARY:  # a tenth of the file, and most of the loss
        kind = "Q8_0"
    return kind if fits(kind, shape[-1]) else "F16"


def _write_header(
    writer: GGUFWriter, settings: Mapping[str, Any], found: dict[str, Place], factors: dict[str, Tensor], kind: str
) -> None:
    for key, value in settings.items():
        if key != "general.architecture":  # which the writer has
            writer.add_key_value(key, value, _value_type(value))
    shapes = {name: place.shape for name, place in found.items()} | {n: tuple(t.shape) for n, t in factors.items()}
    for name, shape in shapes.items():
        own = stored_as(name, shape, kind)
        total = size(own, shape[-1]) * (torch.Size(shape).numel() // shape[-1])
        writer.add_tensor_info(name, shape, np.dtype(np.float32), total, GGMLQuantizationType[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _value_type(value: Any) -> GGUFValueType:
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    kinds |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    return kinds[type(value)]


def _write_tensors(
    writer: GGUFWriter,
    found: dict[str, Place],
    factors: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
    kind: str,
) -> None:
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for name, place in found.items():
        own = stored_as(name, place.shape, kind)
        for rows in _slabs(place, tensors):
            file.write(_encoded(name, rows, own).data)
        writer.write_padding(file, file.tell())
    for divisors in factors.values():
        file.write(encode(divisors[None], "F32").data)
        writer.write_padding(file, file.tell())


def _encoded(name: str, rows: Tensor, kind: str) -> np.ndarray:
    rows = rows[None] if rows.dim() == 1 else rows
    if kind not in ("F32", "BF16"):
        peak = rows.abs().max().item()
        if not peak <= 65504.0:  # what f16, of which blocks have their scales, can hold; not so for a NaN either
            raise OneblockError(f"tensor {name!r} holds {peak:g}, too much for {kind.lower()}: choose bf16 or f32")
    return encode(rows, kind)


def _slabs(place: Place, ours: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The rows of a tensor as the file has them; a vector is one piece."""
    order = place.order()
    for part in place.parts:
        own = rows_of(ours[part.name])
        step = part.size if own.dim() == 1 else max(1, SLAB // place.shape[-1])
        for first in range(0, part.size, step):
            where = slice(first, first + step) if order is None else order[first : first + step].to(own.device)
            rows = own[where].cpu()
            yield rows.float() + place.offset if place.offset else rows
