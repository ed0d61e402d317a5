"""`oneblock tokenizer`: train one, or see how one cuts a text."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from oneblock.errors import OneblockError
from oneblock.text.tokenizer import Tokenizer
from oneblock.text.train import train_bpe

COLOURS = ("on grey30", "on blue", "on dark_green", "on dark_red", "on purple4")


@dataclass(frozen=True)
class Options:
    """Train a byte-level BPE tokenizer (--train FILES --out FOLDER), or show how one cuts a text."""

    model: Path | None = None  # folder or file of a tokenizer to look at
    text: str | None = None  # what to cut; without it: standard input
    special: bool = False  # control tokens written in the text become their ids
    train: tuple[Path, ...] = ()  # text files to train a new one on
    vocab: int = 4096  # ids of the new one, <|endoftext|> included
    out: Path | None = None  # folder for the new one
    json: bool = False  # print ids and tokens, or what was trained, as JSON


def tokenizer(options: Options) -> None:
    if options.train:
        return _train(options)
    if options.model is None:
        raise OneblockError("nothing to do: give --model FOLDER to look at one, or --train FILES --out FOLDER")
    found = Tokenizer.load(options.model)
    text = sys.stdin.read() if options.text is None else options.text
    ids = found.encode(text, special=options.special)
    tokens = [found.backend.id_to_token(id) or "" for id in ids]
    if options.json:
        print(jsonlib.dumps({"ids": ids, "tokens": tokens, "vocab": found.vocab_size}, ensure_ascii=False))
        return
    shown = Text()
    for i, id in enumerate(ids):
        shown.append(found.decode([id], skip_special=False) or tokens[i], COLOURS[i % len(COLOURS)])
    console = Console()
    console.print(shown, soft_wrap=True)
    console.print(" ".join(map(str, ids)), soft_wrap=True, highlight=False)
    console.print(f"{len(ids):,} tokens, {len(text.encode()):,} bytes; {found.vocab_size:,} ids", highlight=False)


def _train(options: Options) -> None:
    if options.out is None:
        raise OneblockError("where should the tokenizer go? add --out FOLDER")
    found = train_bpe(options.train, options.vocab, progress=sys.stderr.isatty())
    found.save(options.out)
    if options.json:
        print(jsonlib.dumps({"out": str(options.out), "vocab": found.vocab_size}))
    else:
        print(f"{found.vocab_size:,} ids in {options.out}; see it cut: oneblock tokenizer --model {options.out}")
