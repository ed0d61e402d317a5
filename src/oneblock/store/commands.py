"""`oneblock export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from oneblock.errors import OneblockError
from oneblock.files import refuse_same_folder
from oneblock.units import format_bytes

if TYPE_CHECKING:
    from oneblock.store.load import Checkpoint
    from oneblock.text import Tokenizer


@dataclass(frozen=True)
class ExportOptions:
    """Write a model as one GGUF file, for llama.cpp and the programs built on it."""

    model: Positional[str]  # model folder, GGUF file, or org/name[@revision] on the hub
    out: Positional[Path]  # file to write, its name ending in .gguf
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None  # of weight matrices; default: the model's dtype
    tokenizer: bool = True  # include the tokenizer and its chat template


def export(options: ExportOptions) -> None:
    from oneblock.store.gguf import save_gguf
    from oneblock.store.hub import resolve

    path = resolve(options.model)
    refuse_same_folder(options.out, path)
    if options.out.suffix != ".gguf" and not options.out.is_dir():
        raise OneblockError(f"{options.out}: a GGUF file is recognized by its name; end it in .gguf")
    model, tokenizer = open_model(path)
    name = Path(options.model.partition("@")[0]).name.removesuffix(".gguf")
    save_gguf(options.out, model, tokenizer if options.tokenizer else None, options.type, name)
    print(f"{options.out}: {format_bytes(options.out.expanduser().stat().st_size)}")


def open_model(path: Path) -> tuple[Checkpoint, Tokenizer | None]:
    """Load a folder or a GGUF file, with its tokenizer if it has one."""
    from oneblock.store.gguf import load_gguf
    from oneblock.store.load import load_model
    from oneblock.text import Tokenizer

    if path.suffix == ".gguf":
        return load_gguf(path)
    return load_model(path), Tokenizer.load(path) if Tokenizer.find(path) else None
