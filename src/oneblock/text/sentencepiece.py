"""SentencePiece `.model` files as `tokenizers` backends, with a reader for the few protobuf fields that matter."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from oneblock.errors import OneblockError
from oneblock.text.bytepairs import token_splits

SPACE = "▁"  # SentencePiece's symbol for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types
UNIGRAM, BPE = 1, 2  # model types
ALL_SPACES = 1 << 16


@dataclass
class Model:
    """The fields of a file. Field numbers: sentencepiece_model.proto."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, type
    kind: int = UNIGRAM
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    charsmap: bytes = b""  # compiled character replacements
    add_prefix: bool = True  # a space is put before the text
    squeeze: bool = True  # repeated spaces become one, and those at both ends are removed


def build_sentencepiece(model: Model, special: Collection[str] = ()) -> Tokenizer:
    """The backend of a BPE or unigram model. `special`: pieces that are control tokens, whatever their type."""
    control = [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN) or text in special]
    defined = [text for text, _, kind in model.pieces if kind == USER_DEFINED and text not in special]
    tokenizer = Tokenizer(_build_model(model, ignore_merges=bool(defined)))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    splits: list[Any] = []
    if defined:  # as added tokens they would restart the text, and get the space prefix
        splits.append(pre_tokenizers.Split(Regex(trie_pattern(defined)), "isolated"))
    if defined or model.kind == UNIGRAM:
        splits.append(_split_inside(control))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits) if splits else None
    tokenizer.decoder = decoders.Sequence(_decoders(model))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    return tokenizer


def _build_model(model: Model, ignore_merges: bool) -> Any:
    """`ignore_merges`: a pre-token that is a piece becomes it, even where merges do not lead there."""
    fallback = any(kind == BYTE for _, _, kind in model.pieces)
    if model.kind == UNIGRAM:
        return models.Unigram([(text, score) for text, score, _ in model.pieces], model.unk_id, fallback)
    vocab = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    unk = model.pieces[model.unk_id][0]
    merges = merges_of(model, vocab)
    return models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback, ignore_merges=ignore_merges)


def trie_pattern(words: Collection[str]) -> str:
    """A pattern of any of the words, longest first, as a trie: alternatives one by one are slow for thousands."""
    branches: dict[str, list[str]] = {}
    for word in words:
        if word:
            branches.setdefault(word[0], []).append(word[1:])
    patterns = []
    for letter, tails in branches.items():
        longer = trie_pattern([tail for tail in tails if tail])
        optional = "?" if "" in tails and longer else ""
        patterns.append(re.escape(letter) + (f"(?:{longer}){optional}" if longer else ""))
    return "|".join(patterns)


def _split_inside(control: list[str]) -> pre_tokenizers.Split:
    """A split after the first character of each control token, so that plain text does not become one."""
    places = "|".join(f"(?<={re.escape(text[:1])})(?={re.escape(text[1:])})" for text in control)
    return pre_tokenizers.Split(Regex(places), "isolated")


def _normalizers(model: Model) -> list[Any]:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _decoders(model: Model) -> list[Any]:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = ALL_SPACES if model.squeeze else int(model.add_prefix)  # stripped from the start
    return [*steps, decoders.Strip(" ", spaces, 0)] if spaces else steps


def merges_of(model: Model, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that forms a third one, in the order of the third's score, highest first."""
    merges: list[tuple[float, tuple[str, str]]] = []
    for text, score, kind in model.pieces:
        if kind in (NORMAL, USER_DEFINED, UNUSED):
            merges += [(-score, pair) for pair in sorted(token_splits(text, vocab), key=lambda pair: vocab[pair[0]])]
    return [pair for _, pair in sorted(merges, key=lambda item: item[0])]


def read_model(path: Path) -> Model:
    """The fields of a `.model` file. OneblockError where it is not one."""
    model = Model()
    try:
        for number, value in read_fields(path.read_bytes()):
            if number == 1:
                model.pieces.append(_read_piece(value))
            elif number == 2:
                _read_trainer(model, value)
            elif number == 3:
                _read_normalizer(model, value)
    except (IndexError, TypeError, ValueError, struct.error):
        model.pieces.clear()
    if not 0 <= model.unk_id < len(model.pieces):
        raise OneblockError(f"{path} is not a SentencePiece model: get the file again")
    if model.kind not in (UNIGRAM, BPE):
        raise OneblockError(f"{path} is a SentencePiece word or character model: only BPE and unigram are supported")
    return model


def _read_piece(data: Any) -> tuple[str, float, int]:
    fields = dict(read_fields(data))
    return bytes(fields.get(1, b"")).decode("utf-8"), fields.get(2, 0.0), fields.get(3, NORMAL)


def _read_trainer(model: Model, data: Any) -> None:
    fields = dict(read_fields(data))
    model.kind = fields.get(3, UNIGRAM)
    ids = (fields.get(number, default) for number, default in ((40, 0), (41, 1), (42, 2)))
    model.unk_id, model.bos_id, model.eos_id = (i - (1 << 64) if i >= 1 << 63 else i for i in ids)  # -1: absent


def _read_normalizer(model: Model, data: Any) -> None:
    fields = dict(read_fields(data))
    model.charsmap = bytes(fields.get(2, b""))
    model.add_prefix, model.squeeze = bool(fields.get(3, 1)), bool(fields.get(4, 1))


def read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: int, float, or bytes (text or a nested message)."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        match key & 7:
            case 0:
                value, at = _read_varint(data, at)
            case 1:
                value, at = struct.unpack_from("<d", data, at)[0], at + 8
            case 2:
                size, at = _read_varint(data, at)
                if at + size > len(data):
                    raise ValueError("truncated message")
                value, at = data[at : at + size], at + size
            case 5:
                value, at = struct.unpack_from("<f", data, at)[0], at + 4
            case _:
                raise ValueError("unknown wire type")
        yield key >> 3, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a little-endian base-128 integer; every byte but the last has its top bit set."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
