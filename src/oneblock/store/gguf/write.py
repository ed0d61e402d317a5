"""A model and its tokenizer to one GGUF file, in the form of llama.cpp's converter, tensor by tensor in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.files import replace_file
from oneblock.model import Decoder
from oneblock.store.gguf.architectures import map_gguf_tensors
from oneblock.store.gguf.config import write_metadata
from oneblock.store.gguf.vocabulary import write_tokenizer
from oneblock.store.load import Checkpoint, parameter_shapes
from oneblock.store.name_tables import Shape
from oneblock.store.tensors import CODES, DTYPES, stored_chunks
from oneblock.text import Tokenizer

FILE_TYPES = {"F32": gguf.LlamaFileType.ALL_F32}
FILE_TYPES |= {code: gguf.LlamaFileType[f"MOSTLY_{code}"] for code in ("F16", "BF16", "Q8_0", "Q4_0")}
TYPES = {code.lower(): code for code in FILE_TYPES}
VOCABULARY = ("token_embd.weight", "output.weight")
FP16_MAX = 65504.0
VALUE_TYPES = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
VALUE_TYPES |= {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}


def save_gguf(
    path: str | Path,
    model: Decoder | Checkpoint,
    tokenizer: Tokenizer | None = None,
    type: str | None = None,
    name: str = "",
) -> None:
    """Write a model as one file. `type`: f32, f16, bf16, q8_0 or q4_0; None: the model's dtype.

    Vectors are stored in fp32, matrices whose rows are not whole blocks in f16, the embedding and LM head of a q4_0
    file in q8_0. The old file stays until the new one is complete. OneblockError if GGUF cannot express the model, or
    if the disk is full.
    """
    config = model.config if isinstance(model, Checkpoint) else {}
    model = model.model if isinstance(model, Checkpoint) else model
    path, code = Path(path).expanduser(), choose_file_code(model, type)
    arch, family, metadata, rope_divisors = write_metadata(model.spec, config.get("model_type"))
    disk_tensors = map_gguf_tensors(arch, family, model.spec, parameter_shapes(model))
    metadata |= {"general.name": name or path.stem, "general.type": "model", "general.file_type": int(FILE_TYPES[code])}
    metadata |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    metadata |= write_tokenizer(tokenizer, model.spec.vocab)
    parameters = dict(model.named_parameters())
    shapes = {name: disk.shape for name, disk in disk_tensors.items()}
    shapes |= {name: tuple(divisors.shape) for name, divisors in rope_divisors.items()}
    codes = {name: choose_tensor_code(name, shape, code) for name, shape in shapes.items()}
    with replace_file(path) as new:
        writer = gguf.GGUFWriter(new, arch)
        try:
            _write_header(writer, metadata, shapes, codes)
            for name, disk in disk_tensors.items():
                _write_tensor(writer, name, codes[name], stored_chunks(disk, parameters, torch.float32))
            for name, divisors in rope_divisors.items():
                _write_tensor(writer, name, codes[name], [divisors])
        finally:
            writer.close()


def choose_file_code(model: Decoder, type: str | None) -> str:
    if type is None:
        code = CODES.get(model.embed.weight.dtype, "")
        return code if code in FILE_TYPES else "F32"
    if type not in TYPES:
        raise OneblockError(f"type {type!r} is not supported; choose one of {', '.join(TYPES)}")
    return TYPES[type]


def choose_tensor_code(name: str, shape: tuple[int, ...], file_code: str) -> str:
    """The type of one tensor in a file of a type."""
    if len(shape) == 1 or name.startswith("position_embd") or ".ffn_gate_inp." in name:  # the router
        return "F32"
    if file_code == "Q4_0" and name in VOCABULARY:  # a tenth of the file, and most of the loss
        file_code = "Q8_0"
    return file_code if shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[file_code]][0] == 0 else "F16"


def _write_header(
    writer: gguf.GGUFWriter, metadata: Mapping[str, Any], shapes: Mapping[str, Shape], codes: Mapping[str, str]
) -> None:
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer adds it
            writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[codes[name]]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * block_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensor(writer: gguf.GGUFWriter, name: str, code: str, chunks: Iterable[Tensor]) -> None:
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())  # tensors start at multiples of the alignment
    for chunk in chunks:
        file.write(_encode(name, chunk, code).data)
    writer.write_padding(file, file.tell())


def _encode(name: str, values: Tensor, code: str) -> np.ndarray:
    """Fp32 numbers in the bytes of a type; block types are whole blocks."""
    if code not in ("F32", "BF16"):
        peak = values.abs().max().item()
        if not peak <= FP16_MAX:  # block scales are fp16 too; a NaN also ends here
            raise OneblockError(f"tensor {name!r} holds {peak:g}, too large for {code.lower()}; choose bf16 or f32")
    if code in DTYPES:
        return values.to(DTYPES[code]).contiguous().view(-1).view(torch.uint8).numpy()
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(values.reshape(1, -1).numpy(), gguf.GGMLQuantizationType[code])
