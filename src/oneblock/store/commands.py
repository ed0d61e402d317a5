"""`oneblock export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from oneblock.store.load import Checkpoint
    from oneblock.text import Tokenizer


@dataclass(frozen=True)
class ExportOptions:
    """Write a model as one GGUF file, which llama.cpp and its kin run."""

    model: Positional[str]  # a model's folder, a GGUF file, or an org/name on the hub
    out: Positional[Path]  # the file to write
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None  # of the matrices; left out: as the model is
    tokenizer: bool = True  # put the tokenizer and its chat template into the file


def export(options: ExportOptions) -> None:
    from oneblock.store.gguf import save_gguf

    model, tokenizer = opened(options.model)
    name = Path(options.model.partition("@")[0]).name.removesuffix(".gguf")
    save_gguf(options.out, model, tokenizer if options.tokenizer else None, options.type, name)
    size = options.out.expanduser().stat().st_size
    print(f"{options.out}: {size / 1e6:,.1f} MB")


def opened(name: str) -> tuple[Checkpoint, Tokenizer | None]:
    """A model and its tokenizer, if there is one."""
    from oneblock.store.gguf import load_gguf
    from oneblock.store.hub import resolve
    from oneblock.store.load import load_model
    from oneblock.text import Tokenizer

    path = resolve(name)
    if path.suffix == ".gguf":
        return load_gguf(path)
    return load_model(path), Tokenizer.load(path) if Tokenizer.find(path) else None
