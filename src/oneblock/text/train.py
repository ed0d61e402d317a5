"""Tokenizers made here: byte-level BPE, single characters, single bytes. All are ordinary tokenizer.json files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.text.bytepairs import CL100K, byte_letters
from oneblock.text.bytepairs import byte_level as cut_and_spell
from oneblock.text.tokenizer import Tokenizer

END = "<|endoftext|>"


def train_bpe(
    texts: Iterable[str | Path], vocab_size: int, special: Sequence[str] = (END,), progress: bool = False
) -> Tokenizer:
    """Byte-level BPE (arXiv:1508.07909) of at most `vocab_size` ids, control tokens included, cut as GPT-4's is.

    `texts`: texts, and paths of text files. `special`: control tokens, the first of which ends a text.
    """
    least = 256 + len(special)
    if vocab_size < least:
        raise OneblockError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(special)} control tokens need {least}"
        )
    backend = cut_and_spell(Backend(models.BPE()), CL100K)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, normalized=False) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    backend.train_from_iterator(map(_read, texts), trainer)
    return Tokenizer(backend, {"eos_token": special[0]} if special else {})


def _read(text: str | Path) -> str:
    if isinstance(text, str):
        return text
    try:
        found = text.read_text("utf-8-sig")
    except OSError as error:
        raise OneblockError(f"{text}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise OneblockError(f"{text} is no UTF-8 text (byte {error.start}): convert it first") from None
    if not found.strip():
        raise OneblockError(f"{text} is empty: give a text")
    return found


def characters(text: str) -> Tokenizer:
    """One id for each character of the text; others cannot be encoded and are left out."""
    if not text:
        raise OneblockError("there is no text to take characters from")
    vocab = {letter: i for i, letter in enumerate(sorted(set(text)))}
    backend = Backend(models.BPE(vocab, []))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    """One id for each byte: any text, no training."""
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(byte_letters())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)
