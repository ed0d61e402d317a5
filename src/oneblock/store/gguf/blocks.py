"""Stored numbers <-> tensors, rows at a time. Blocks of quantised numbers are the library's work."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from oneblock.store.tensors import DTYPES

PLAIN = {name: DTYPES[name] for name in ("F32", "F16", "BF16")}
READ = (*PLAIN, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
WRITTEN = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}


def size(kind: str, count: int) -> int:
    """Bytes of so many numbers in a row."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return count // block * block_bytes


def fits(kind: str, count: int) -> bool:
    """Whether rows of so many numbers are whole blocks."""
    return count % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0


def decode(data: np.ndarray, kind: str) -> Tensor:
    """Rows of bytes (n, bytes) to rows of numbers (n, columns), in fp32 where they were quantised."""
    if kind in PLAIN:
        return torch.from_numpy(data).view(PLAIN[kind])
    with np.errstate(all="ignore"):  # a damaged block may hold any scale, infinite too
        return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind]))


def encode(values: Tensor, kind: str) -> np.ndarray:
    """Rows of numbers (n, columns) to rows of bytes."""
    if kind in PLAIN:
        return values.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy()
    with np.errstate(all="ignore"):
        return quants.quantize(values.float().contiguous().numpy(), GGMLQuantizationType[kind])
