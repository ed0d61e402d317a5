"""From options to a model, a tokenizer and ids."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from oneblock.config import nearest
from oneblock.data import encode, read_texts
from oneblock.errors import OneblockError
from oneblock.model import Dropout
from oneblock.spec import Spec, spec
from oneblock.store import read_config
from oneblock.text import Tokenizer
from oneblock.text.train import byte_level, characters, train_bpe
from oneblock.train.options import Dropouts, Train

LONGEST = 1024  # tokens in a row where nothing else is asked for

Ids = NDArray[Any]


@dataclass(frozen=True)
class Job:
    """What there is to learn, and for whom."""

    spec: Spec
    tokenizer: Tokenizer
    context: int  # tokens in a row
    train: Ids
    val: Ids | None

    @property
    def fingerprint(self) -> str:
        """Tells whether a resumed run reads the same text."""
        return f"{len(self.train)}-{zlib.crc32(self.train.tobytes()):08x}"


def prepare(options: Train, tokenizer: Tokenizer | None = None) -> Job:
    """Read, tokenise and split the text, and size the model to it. `tokenizer`: a resumed run's own."""
    check(options)
    texts, held_out = read_texts(options.data), read_texts(options.val) if options.val else None
    tokenizer = tokenizer or tokenizer_for(options, [*texts, *(held_out or [])])
    spec, context = spec_for(options, tokenizer.vocab_size)
    ids = encode(texts, tokenizer)
    if held_out is not None:
        train, val = ids, encode(held_out, tokenizer)
    else:
        cut = int(len(ids) * (1 - options.val_share))
        train, val = ids[:cut], ids[cut:] if cut < len(ids) else None
    if val is not None and len(val) < context + 1:
        raise OneblockError(
            f"the validation text has {len(val):,} tokens, fewer than one row of {context:,} and its next token: "
            f"give --val FILES, a larger --val-share, more text or a smaller --context"
        )
    return Job(spec, tokenizer, context, train, val)


def check(options: Train) -> None:
    """Numbers that no run can be made of."""
    loop = options.loop
    for name, value, least in (
        ("--steps", loop.steps, 1),
        ("--batch", loop.batch, 1),
        ("--accumulate", loop.accumulate, 1),
        ("--context", 1 if options.context is None else options.context, 1),
        ("--seed", loop.seed, 0),
        ("--lr", options.optimizer.lr, 0),
        ("--warmup", options.schedule.warmup, 0),
    ):
        if value < least:
            raise OneblockError(f"{name} is {value}, but it must be at least {least}")
    if not 0 <= options.val_share < 1:
        raise OneblockError(f"--val-share is {options.val_share}, but it must lie between 0 and 1")
    for name, p in asdict(options.dropouts).items():
        if p is not None and not 0 <= p < 1:
            raise OneblockError(f"--{name.replace('_', '-')} is {p}, but it must be at least 0 and below 1")


def tokenizer_for(options: Train, texts: Sequence[str]) -> Tokenizer:
    match options.tokenizer:
        case "chars":
            return characters("".join(texts))
        case "bytes":
            return byte_level()
        case "bpe":
            return train_bpe(texts, options.vocab)
    if not Path(options.tokenizer).exists():
        hint = nearest(options.tokenizer, ("chars", "bytes", "bpe"))
        raise OneblockError(f"no tokenizer {options.tokenizer!r}{hint or ': give chars, bytes, bpe or a folder'}")
    return Tokenizer.load(options.tokenizer)


def spec_for(options: Train, vocab: int) -> tuple[Spec, int]:
    """The architecture with the tokenizer's vocabulary, and the tokens in a row."""
    changes = {key: value for key, value in asdict(options.sizes).items() if value is not None}
    if Path(options.model).exists():
        if changes:
            raise OneblockError(
                f"{options.model} has its own sizes: give a model's name to change them ({', '.join(changes)})"
            )
        return from_file(read_config(options.model)[0], options, vocab)
    if options.context is not None:
        changes["context"] = options.context
    made = spec(options.model, vocab=vocab, **changes)
    return made, options.context or min(made.context, LONGEST)


def from_file(found: Spec, options: Train, vocab: int) -> tuple[Spec, int]:
    """A config.json's own architecture, which must have room for the tokenizer and the rows."""
    if found.vocab < vocab:
        raise OneblockError(
            f"{options.model} has a vocabulary of {found.vocab:,}, but the tokenizer has {vocab:,} tokens: "
            f"give the tokenizer that belongs to it with --tokenizer FOLDER"
        )
    context = options.context or min(found.context, LONGEST)
    if context > found.context:
        raise OneblockError(f"--context {context} is over the {found.context} tokens that {options.model} is made for")
    return found, context


def dropout_of(options: Dropouts) -> Dropout | None:
    """None where nothing is dropped."""

    def or_all(p: float | None) -> float:
        return options.dropout if p is None else p

    dropout = Dropout(
        embed=or_all(options.embed_dropout),
        attn=or_all(options.attn_dropout),
        residual=or_all(options.residual_dropout),
        mlp=or_all(options.mlp_dropout),
    )
    return None if dropout == Dropout() else dropout
