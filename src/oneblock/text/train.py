"""New tokenizers: byte-level BPE, single characters, single bytes. All are saved as tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from oneblock.config import Range, check_range
from oneblock.errors import OneblockError
from oneblock.files import read_text
from oneblock.text.bytepairs import CL100K, byte_letters
from oneblock.text.bytepairs import byte_level as set_byte_level
from oneblock.text.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 1 << 20


def train_bpe(
    texts: Iterable[str | Path], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,), progress: bool = False
) -> Tokenizer:
    """Train byte-level BPE (arXiv:1508.07909) of at most `vocab_size` ids, with GPT-4's pre-tokenization pattern.

    `texts`: strings, and paths of text files. `special`: control tokens, counted in `vocab_size`; the first is the
    end-of-text token.
    """
    check_range("vocab_size", vocab_size, Range(256 + len(special), MAX_VOCAB), int)  # 256: the bytes
    backend = set_byte_level(Backend(models.BPE()), CL100K)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, normalized=False) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    backend.train_from_iterator(map(_read_text, texts), trainer)
    return Tokenizer(backend, {"eos_token": special[0]} if special else {})


def _read_text(text: str | Path) -> str:
    if isinstance(text, str):
        return text
    content = read_text(text)
    if not content.strip():
        raise OneblockError(f"{text} is empty: give a file with text")
    return content


def characters(text: str) -> Tokenizer:
    """A tokenizer with one id for each character of the text; other characters cannot be encoded."""
    if not text:
        raise OneblockError("there is no text to take characters from")
    vocab = {letter: i for i, letter in enumerate(sorted(set(text)))}
    backend = Backend(models.BPE(vocab, []))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    """A tokenizer with one id for each byte, which encodes any text."""
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(byte_letters())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)
