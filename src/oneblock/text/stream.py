"""Ids to text, as they come: never half a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.text.bytepairs import byte_letters
from oneblock.text.sentencepiece import SPACE

BYTE_OF = {letter: byte for byte, letter in enumerate(byte_letters())}
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WINDOW = 8  # ids before a new one that a decoder which looks back gets to see


def _each(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte that is no text, as SentencePiece has it; Python's `replace` gives one for several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("oneblock.each", _each)


@dataclass(frozen=True)
class Spelling:
    """How a decoder spells tokens: the bytes of each, what is left out at both ends, what stands for a broken byte."""

    spell: Callable[[str], bytes]
    strip: int = 0  # spaces that are left out where the first token begins with one
    held: bytes = b""  # left out where the last token ends with it
    errors: str = "replace"


def spelling(backend: Backend) -> Spelling | None:
    """None for decoders that do not spell token by token."""
    decoder: dict[str, Any] = {"type": ""}
    if backend.decoder is not None:
        decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return Spelling(_byte_level)
    if kinds == ["Metaspace"]:
        return Spelling(_metaspace, int(decoder.get("prepend_scheme") != "never"))
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        return Spelling(_bytes_or_metaspace, parts[3]["start"] if kinds[3:] else 0, errors="oneblock.each")
    if kinds == ["BPEDecoder"]:
        return Spelling(lambda token: token.replace(parts[0]["suffix"], " ").encode(), held=b" ")
    return Spelling(str.encode) if kinds == ["Fuse"] else None


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_OF[letter] for letter in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def _metaspace(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _bytes_or_metaspace(token: str) -> bytes:
    found = BYTE_PIECE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else _metaspace(token)


class Pieces:
    """The bytes of each id, found once; None where the decoder does not spell token by token."""

    def __init__(self, backend: Backend):
        self.backend, self.spelling = backend, spelling(backend)
        self._known: dict[int, bytes] = {}

    def __getitem__(self, id: int) -> bytes:
        """Ids outside the vocabulary, as a padded embedding has them, are no bytes at all."""
        found = self._known.get(id)
        if found is None:
            token = self.backend.id_to_token(checked(id))
            assert self.spelling is not None
            found = self._known[int(id)] = b"" if token is None else self.spelling.spell(token)
        return found

    def lead(self, id: int, spaces: int) -> tuple[bytes, int]:
        """What an id shows at the start of a text, where so many spaces are left out, and how many still are."""
        found = self[id]
        if found and BYTE_PIECE.fullmatch(self.backend.id_to_token(id) or ""):
            return found, 0
        shown = found.removeprefix(b" ")  # of each token one
        return shown, 0 if shown else spaces - len(found)

    def text(self, ids: Iterable[int], hidden: frozenset[int]) -> str:
        """What a stream of the ids adds up to, in one go."""
        assert self.spelling is not None
        shown = [id for id in ids if id not in hidden]
        at, start, spaces = 0, b"", self.spelling.strip
        while spaces and at < len(shown):
            start, spaces = self.lead(shown[at], spaces)
            at += 1
        found = start + b"".join(map(self.__getitem__, shown[at:]))
        return found.removesuffix(self.spelling.held).decode("utf-8", self.spelling.errors)


def checked(id: int) -> int:
    try:
        if 0 <= id < 1 << 32:
            return int(id)
    except TypeError:
        pass
    raise OneblockError(f"{id!r} is no id of a token: ids are whole numbers from 0")


class Detokenizer:
    """`push` ids one by one; the pieces it returns, with `flush` at the end, add up to `Tokenizer.decode`."""

    def __init__(self, pieces: Pieces, hidden: frozenset[int]):
        self._pieces, self._hidden = pieces, hidden
        how = pieces.spelling
        self._utf8 = codecs.getincrementaldecoder("utf-8")(how.errors if how else "replace")
        self._spaces, self._ends = (how.strip, how.held) if how else (0, b"")
        self._held = b""  # shown only when something follows
        self._ids: list[int] = []  # for decoders that must see what came before

    def push(self, id: int) -> str:
        """What may be shown now that this id has come: perhaps nothing, perhaps several characters."""
        if id in self._hidden:
            return ""
        if self._pieces.spelling is None:
            return self._windowed(checked(id))
        piece = self._pieces[id]
        if self._spaces:
            piece, self._spaces = self._pieces.lead(id, self._spaces)
        if self._ends and piece:
            piece, self._held = self._held + piece, b""
            if piece.endswith(self._ends):
                piece, self._held = piece.removesuffix(self._ends), self._ends
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The rest: an unfinished character becomes U+FFFD."""
        self._held = b""
        return self._utf8.decode(b"", True)

    def _windowed(self, id: int) -> str:
        """The text that the id adds to that of the few before it."""
        self._ids = [*self._ids[-WINDOW:], id]
        before, after = (
            self._pieces.backend.decode(ids, skip_special_tokens=False) for ids in (self._ids[:-1], self._ids)
        )
        return after[len(before) :]
