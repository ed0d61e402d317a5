"""GGUF, llama.cpp's single-file format: read as a model with its tokenizer, and written from them."""

from __future__ import annotations

from importlib.util import find_spec

from oneblock.errors import missing_extra

if find_spec("gguf") is None:  # an optional dependency
    raise missing_extra("GGUF", "gguf", "gguf")

from oneblock.store.gguf.read import load_gguf
from oneblock.store.gguf.write import save_gguf

__all__ = ["load_gguf", "save_gguf"]
