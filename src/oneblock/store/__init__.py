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

_MODULES = {
    "Checkpoint": "load",
    "load_model": "load",
    "read_config": "config",
    "replace_model_folder": "save",
    "resolve": "hub",
    "resolve_architecture": "hub",
    "save_model": "save",
    "write_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
