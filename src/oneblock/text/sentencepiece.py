"""SentencePiece `.model` files as `tokenizers` objects. The file is a protobuf; the few fields needed are read here."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from oneblock.errors import OneblockError

SPACE = "▁"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models
EVERY = 1 << 16  # spaces: all there are


@dataclass
class Model:
    """What the file says. Field numbers: sentencepiece_model.proto."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, kind
    kind: int = UNIGRAM
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    charsmap: bytes = b""  # a compiled table of character replacements
    dummy_prefix: bool = True  # a text begins with a space
    squeeze: bool = True  # several spaces become one, those at the ends none


def from_sentencepiece(path: Path, special: Collection[str] = ()) -> tuple[Tokenizer, Model]:
    """`special`: pieces that the folder's config calls control tokens, whatever the model itself says."""
    model = read_model(path)
    control = [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN) or text in special]
    defined = [text for text, _, kind in model.pieces if kind == USER_DEFINED and text not in special]
    tokenizer = Tokenizer(_model(path, model, whole=bool(defined)))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    cuts: list[Any] = []
    if defined:  # not added tokens: after each of those a text would begin anew, and with a space
        cuts.append(pre_tokenizers.Split(Regex(any_of(defined)), "isolated"))
    if defined or model.kind == UNIGRAM:
        cuts.append(_apart(control))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts) if cuts else None
    tokenizer.decoder = decoders.Sequence(_decoders(model))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    return tokenizer, model


def _model(path: Path, model: Model, whole: bool) -> Any:
    """`whole`: what is cut out of the text and is a piece becomes it, whether merges lead there or not."""
    fallback = any(kind == BYTE for _, _, kind in model.pieces)
    if model.kind == UNIGRAM:
        return models.Unigram([(text, score) for text, score, _ in model.pieces], model.unk_id, fallback)
    if model.kind != BPE:
        raise OneblockError(f"{path} is a SentencePiece model of words or characters: only BPE and unigram are known")
    vocab = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    unk = model.pieces[model.unk_id][0]
    parts = merges_of(model, vocab)
    return models.BPE(vocab, parts, unk_token=unk, fuse_unk=True, byte_fallback=fallback, ignore_merges=whole)


def any_of(words: Collection[str]) -> str:
    """A pattern of any of the words, the longest first, that branches letter by letter: there may be thousands."""
    branches: dict[str, list[str]] = {}
    for word in words:
        if word:
            branches.setdefault(word[0], []).append(word[1:])
    found = []
    for letter, rests in branches.items():
        longer = any_of([rest for rest in rests if rest])
        optional = "?" if "" in rests and longer else ""
        found.append(re.escape(letter) + (f"(?:{longer}){optional}" if longer else ""))
    return "|".join(found)


def _apart(control: list[str]) -> pre_tokenizers.Split:
    """A cut within each control token: one that a text spells would else be taken for a likely piece."""
    places = "|".join(f"(?<={re.escape(text[:1])})(?={re.escape(text[1:])})" for text in control)
    return pre_tokenizers.Split(Regex(places), "isolated")


def _normalizers(model: Model) -> list[Any]:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _decoders(model: Model) -> list[Any]:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = EVERY if model.squeeze else int(model.dummy_prefix)  # that a text does not begin with
    return [*steps, decoders.Strip(" ", spaces, 0)] if spaces else steps


def merges_of(model: Model, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third one; the higher the third's score, the earlier."""
    merges = []
    for text, score, kind in model.pieces:
        if kind in (NORMAL, USER_DEFINED, UNUSED):
            splits = ((text[:i], text[i:]) for i in range(1, len(text)))
            found = sorted(
                (pair for pair in splits if pair[0] in vocab and pair[1] in vocab), key=lambda p: vocab[p[0]]
            )
            merges += [(-score, pair) for pair in found]
    return [pair for _, pair in sorted(merges, key=lambda item: item[0])]


def read_model(path: Path) -> Model:
    model = Model()
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                _trainer(model, value)
            elif number == 3:
                _normalizer(model, value)
    except (IndexError, TypeError, ValueError, struct.error):
        model.pieces.clear()
    if not 0 <= model.unk_id < len(model.pieces):
        raise OneblockError(f"{path} is no SentencePiece model: get the file again")
    return model


def _piece(data: Any) -> tuple[str, float, int]:
    found = dict(fields(data))
    return bytes(found.get(1, b"")).decode("utf-8"), found.get(2, 0.0), found.get(3, NORMAL)


def _trainer(model: Model, data: Any) -> None:
    found = dict(fields(data))
    model.kind = found.get(3, UNIGRAM)
    ids = (found.get(number, default) for number, default in ((40, 0), (41, 1), (42, 2)))
    model.unk_id, model.bos_id, model.eos_id = (i - (1 << 64) if i >= 1 << 63 else i for i in ids)  # -1: there is none


def _normalizer(model: Model, data: Any) -> None:
    found = dict(fields(data))
    model.charsmap = bytes(found.get(2, b""))
    model.dummy_prefix, model.squeeze = bool(found.get(3, 1)), bool(found.get(4, 1))


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: int, float, or the bytes of text or of a message within."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
            case 1:
                value, at = struct.unpack_from("<d", data, at)[0], at + 8
            case 2:
                size, at = _varint(data, at)
                if at + size > len(data):
                    raise ValueError("the message ends too early")
                value, at = data[at : at + size], at + size
            case 5:
                value, at = struct.unpack_from("<f", data, at)[0], at + 4
            case _:
                raise ValueError("no such wire type")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first; the last byte has no top bit."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
