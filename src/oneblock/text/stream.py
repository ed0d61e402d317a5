"""Ids to text, as they come: never half a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from oneblock.text.bytepairs import byte_letters
from oneblock.text.sentencepiece import SPACE


@dataclass(frozen=True)
class Spelling:
    """How a decoder spells tokens: the bytes of each, and whether the first space of a text is left out."""

    spell: Callable[[str], bytes]
    strip: bool = False


def spelling(backend: Backend) -> Spelling | None:
    """None for decoders that do not spell token by token."""
    decoder: dict[str, Any] = {"type": ""}
    if backend.decoder is not None:
        decoder = json.loads(backend.decoder.__getstate__())
    kinds = [part["type"] for part in decoder.get("decoders", [decoder])]
    if kinds == ["ByteLevel"]:
        return Spelling(_byte_level)
    if kinds == ["Metaspace"]:
        return Spelling(_metaspace, decoder.get("prepend_scheme", "always") != "never")
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        return Spelling(_metaspace, "Strip" in kinds)
    return Spelling(str.encode) if kinds == ["Fuse"] else None


BYTE_OF = {letter: byte for byte, letter in enumerate(byte_letters())}


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_OF[letter] for letter in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def _metaspace(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


class Detokenizer:
    """`push` ids one by one; the pieces it returns, with `flush` at the end, add up to `Tokenizer.decode`."""

    def __init__(self, backend: Backend, spelled: Spelling | None, hidden: frozenset[int]):
        self._backend, self._spelling, self._hidden = backend, spelled, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = spelled is not None and spelled.strip
        self._ids: list[int] = []  # for decoders that must see what came before
        self._shown = ""

    def push(self, id: int) -> str:
        """What may be shown now that this id has come: perhaps nothing, perhaps several characters."""
        if id in self._hidden:
            return ""
        if self._spelling is None:
            return self._whole(id)
        token = self._backend.id_to_token(id)
        return "" if token is None else self._cut(self._utf8.decode(self._spelling.spell(token)))

    def flush(self) -> str:
        """The rest: an unfinished character becomes U+FFFD."""
        return self._cut(self._utf8.decode(b"", True))

    def _cut(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def _whole(self, id: int) -> str:
        self._ids.append(id)
        text, shown = self._backend.decode(self._ids, skip_special_tokens=False), self._shown
        if not text.startswith(shown) or len(text) == len(shown):
            return ""
        self._shown = text
        return text[len(shown) :]
