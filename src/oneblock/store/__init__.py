"""Checkpoints: Hugging Face folders and GGUF files to and from our models. Modules are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oneblock.store.config import read_config, write_config
    from oneblock.store.hub import resolve, resolve_architecture
    from oneblock.store.load import Checkpoint, load_model
    from oneblock.store.save import replace_model_folder, save_model

__all__ = [
    "Checkpoint",
    "load_model",
    "read_config",
    "replace_model_folder",
    "resolve",
    "resolve_architecture",
    "save_model",
    "write_config",
]


def __getattr__(name: str) -> Any:
    for module in ("config", "hub", "load", "save") if name in __all__ else ():  # the last two import torch
        if hasattr(import_module(f"{__name__}.{module}"), name):
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
