"""From options to a model, a tokenizer and ids."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from oneblock.config import nearest
from oneblock.data.documents import DocumentFormat, read_texts, tokenize
from oneblock.data.packed import PackedDataset
from oneblock.data.shards import is_shard_folder, read_shard_folder, read_shard_folders
from oneblock.data.tokens import Tokens, concatenate_tokens
from oneblock.errors import OneblockError
from oneblock.model import Dropout
from oneblock.spec import Spec, get_spec
from oneblock.store import manifest, read_config
from oneblock.text import Tokenizer
from oneblock.text.train import byte_level, characters, train_bpe
from oneblock.train.options import Dropouts, Loop, Train

LONGEST = 1024  # tokens in a row where nothing else is asked for


@dataclass(frozen=True)
class Job:
    """What there is to learn, and for whom."""

    spec: Spec
    tokenizer: Tokenizer
    context: int  # tokens in a row
    texts: tuple[Tokens, ...]  # to learn from
    val: Tokens | None
    fingerprint: str  # tells whether a resumed run reads the same text
    weights: tuple[float, ...] = ()  # of the texts
    documents: bool = False  # whether attention stays inside each document

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    def rows(self, loop: Loop) -> PackedDataset:
        return PackedDataset(self.texts, self.context, loop.batch_size, loop.seed, self.weights, self.documents)


def prepare(options: Train, tokenizer: Tokenizer | None = None) -> Job:
    """Read, tokenise and split the text, and size the model to it. `tokenizer`: a resumed run's own."""
    shards = [path for path in options.data if is_shard_folder(path)]
    if shards and len(shards) < len(options.data):
        other = next(path for path in options.data if path not in shards)
        raise OneblockError(f"{shards[0]} is prepared data and {other} is not: prepare it too (oneblock data prepare)")
    if options.weights and not shards:
        raise OneblockError("--weights are for folders of prepared data (oneblock data prepare)")
    found = from_shards(options) if shards else from_text(options, tokenizer)
    spec, context = spec_for(options, found.tokenizer.vocab_size)
    if found.val is not None and len(found.val) < context + 1:
        raise OneblockError(
            f"the validation text has {len(found.val):,} tokens, fewer than one row of {context:,} and its next token: "
            f"give --val FILES, a larger --val-share, more text or a smaller --context"
        )
    mixed = (options.weights, options.documents)
    job = Job(spec, found.tokenizer, context, found.texts, found.val, found.fingerprint, *mixed)
    job.rows(options.loop)  # what cannot be dealt is told before anything begins
    return job


@dataclass(frozen=True)
class Found:
    """Ids to learn from and to validate on, and their tokenizer."""

    tokenizer: Tokenizer
    texts: tuple[Tokens, ...]
    val: Tokens | None
    fingerprint: str


def from_text(options: Train, tokenizer: Tokenizer | None) -> Found:
    """Documents of files; the end of the tokens is for validation, unless there are files for it."""
    layout = DocumentFormat(options.text_field, options.separator)
    texts, held_out = read_texts(options.data, layout), read_texts(options.val, layout) if options.val else None
    tokenizer = tokenizer or tokenizer_for(options, [*texts, *(held_out or [])])
    whole = tokenize(texts, tokenizer)
    train, val = split(whole, options.val_share) if held_out is None else (whole, tokenize(held_out, tokenizer))
    ids = train.read(0, len(train)).astype(whole.parts[0].dtype)
    return Found(tokenizer, (train,), val, f"{len(ids)}-{zlib.crc32(ids.tobytes()):08x}")


def split(text: Tokens, share: float) -> tuple[Tokens, Tokens | None]:
    cut = int(len(text) * (1 - share))
    return text.slice(0, cut), text.slice(cut, len(text)) if cut < len(text) else None


def from_shards(options: Train) -> Found:
    """Prepared folders; what they keep for validation is validated on, or the end of the first."""
    folders, tokenizer = read_shard_folders(options.data)
    if options.tokenizer != Train.tokenizer:
        given = tokenizer_for(options, [])
        if given.definition() != tokenizer.definition():
            raise OneblockError(
                f"{options.data[0]} was made by another tokenizer ({tokenizer.vocab_size:,} tokens) than --tokenizer "
                f"{options.tokenizer} ({given.vocab_size:,}): leave the flag out, or prepare the data with it"
            )
    kept = options.val or tuple(path / "val" for path in options.data if is_shard_folder(path / "val"))
    texts = [found.open() for found in folders]
    val = None
    if kept:
        read_shard_folders([*options.data, *kept])  # one tokenizer for all
        val = concatenate_tokens([read_shard_folder(path).open() for path in kept])
    else:
        texts[0], val = split(texts[0], options.val_share)
    marks = "-".join(str(manifest.sum_of(found.folder / manifest.MANIFEST)["sha256"])[:8] for found in folders)
    return Found(tokenizer, tuple(texts), val, f"{sum(map(len, texts))}-{marks}")


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
    made = get_spec(options.model, vocab=vocab, **changes)
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
