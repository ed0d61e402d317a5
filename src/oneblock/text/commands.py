"""`oneblock tokenizer`: train a tokenizer, or show how one splits a text."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text

from oneblock.config import Range
from oneblock.errors import OneblockError
from oneblock.text.tokenizer import Tokenizer
from oneblock.text.train import MAX_VOCAB, train_bpe

COLOURS = ("on grey30", "on blue", "on dark_green", "on dark_red", "on purple4")


@dataclass(frozen=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer (--train FILES --out FOLDER), or show how one splits a text (--model FOLDER)."""

    model: Path | None = None  # show: folder with a tokenizer, or one tokenizer file
    text: str | None = None  # show: text to tokenize; default: standard input
    special: bool = False  # show: control tokens written in the text become their ids
    train: tuple[Path, ...] = ()  # train: UTF-8 text files
    vocab: Annotated[int, Range(257, MAX_VOCAB)] = 4096  # train: vocabulary size, 256 bytes and <|endoftext|> included
    out: Path | None = None  # train: folder for the new tokenizer
    json: bool = False  # print JSON


def tokenizer(options: TokenizerOptions) -> None:
    """Run the command."""
    if options.train:
        return train_tokenizer(options)
    if options.model is None:
        raise OneblockError("nothing to do: give --model FOLDER to show a tokenizer, or --train FILES --out FOLDER")
    loaded = Tokenizer.load(options.model)
    text = sys.stdin.read() if options.text is None else options.text
    ids = loaded.encode(text, special=options.special)
    tokens = [loaded.backend.id_to_token(id) or "" for id in ids]
    if options.json:
        print(jsonlib.dumps({"ids": ids, "tokens": tokens, "vocab": loaded.vocab_size}, ensure_ascii=False))
        return
    coloured = Text()
    for i, id in enumerate(ids):
        coloured.append(loaded.decode([id], skip_special=False) or tokens[i], COLOURS[i % len(COLOURS)])
    console = Console()
    console.print(coloured, soft_wrap=True)
    console.print(" ".join(map(str, ids)), soft_wrap=True, highlight=False)
    size = len(text.encode("utf-8", "replace"))
    console.print(f"{len(ids):,} tokens, {size:,} bytes; vocabulary {loaded.vocab_size:,}", highlight=False)


def train_tokenizer(options: TokenizerOptions) -> None:
    if options.out is None:
        raise OneblockError("--train needs a folder for the new tokenizer: add --out FOLDER")
    trained = train_bpe(options.train, options.vocab, progress=sys.stderr.isatty())
    trained.save(options.out)
    if options.json:
        print(jsonlib.dumps({"out": str(options.out), "vocab": trained.vocab_size}))
    else:
        print(f"{trained.vocab_size:,} tokens in {options.out}; show it with: oneblock tokenizer --model {options.out}")
