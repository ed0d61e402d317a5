"""Token ids to text, all at once or one at a time, without emitting half a character."""

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
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
DETOKENIZER_CONTEXT = 8  # prompt tokens that a detokenizer reads first: a reply may begin inside a word
WINDOW = 8  # previous ids given to a decoder that needs context


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each invalid byte, as SentencePiece does; Python's `replace` merges several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("oneblock.each", _replace_each_byte)


@dataclass(frozen=True)
class Spelling:
    """How a decoder turns each token into bytes, and what it strips at both ends of the text."""

    to_bytes: Callable[[str], bytes]
    strip: int = 0  # leading spaces that are stripped from the text
    suffix: bytes = b""  # stripped from the end of the text
    errors: str = "replace"  # error handler for invalid UTF-8


def read_spelling(backend: Backend) -> Spelling | None:
    """The spelling of a backend's decoder; None if it does not decode token by token."""
    decoder: dict[str, Any] = {"type": ""}
    if backend.decoder is not None:
        decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return Spelling(_byte_level_bytes)
    if kinds == ["Metaspace"]:
        return Spelling(_metaspace_bytes, int(decoder.get("prepend_scheme") != "never"))
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        return Spelling(_byte_fallback_bytes, parts[3]["start"] if kinds[3:] else 0, errors="oneblock.each")
    if kinds == ["BPEDecoder"]:
        return Spelling(lambda token: token.replace(parts[0]["suffix"], " ").encode(), suffix=b" ")
    return Spelling(str.encode) if kinds == ["Fuse"] else None


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_OF[letter] for letter in token])
    except KeyError:  # an added token, which is not byte-encoded
        return token.encode()


def _metaspace_bytes(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _byte_fallback_bytes(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _metaspace_bytes(token)


class TokenBytes:
    """The bytes of each token id, cached. Only for backends with a `spelling`."""

    def __init__(self, backend: Backend):
        self.backend, self.spelling = backend, read_spelling(backend)
        self._cache: dict[int, bytes] = {}

    def __getitem__(self, id: int) -> bytes:
        """The bytes of an id; empty for ids outside the vocabulary, which a padded embedding has."""
        content = self._cache.get(id)
        if content is None:
            token = self.backend.id_to_token(check_id(id))
            assert self.spelling is not None
            content = self._cache[int(id)] = b"" if token is None else self.spelling.to_bytes(token)
        return content

    def strip_leading(self, id: int, spaces: int) -> tuple[bytes, int]:
        """The bytes of an id at the start of a text, and how many leading spaces are still to be stripped."""
        content = self[id]
        if content and BYTE_TOKEN.fullmatch(self.backend.id_to_token(id) or ""):
            return content, 0
        stripped = content.removeprefix(b" ")  # one space per token
        return stripped, 0 if stripped else spaces - len(content)

    def decode(self, ids: Iterable[int], hidden: frozenset[int]) -> str:
        """The text of ids without the hidden ones, equal to what a `Detokenizer` returns in total."""
        assert self.spelling is not None
        shown = [id for id in ids if id not in hidden]
        at, start, spaces = 0, b"", self.spelling.strip
        while spaces and at < len(shown):
            start, spaces = self.strip_leading(shown[at], spaces)
            at += 1
        content = start + b"".join(map(self.__getitem__, shown[at:]))
        return content.removesuffix(self.spelling.suffix).decode("utf-8", self.spelling.errors)


def check_id(id: int) -> int:
    try:
        if 0 <= id < 1 << 32:
            return int(id)
    except TypeError:
        pass
    raise OneblockError(f"{id!r} is not a token id: ids are integers from 0")


class Detokenizer:
    """Takes ids one at a time; the strings of `push` and `flush` add up to `Tokenizer.decode`."""

    def __init__(self, token_bytes: TokenBytes, hidden: frozenset[int]):
        self._token_bytes, self._hidden = token_bytes, hidden
        spelling = token_bytes.spelling
        self._utf8 = codecs.getincrementaldecoder("utf-8")(spelling.errors if spelling else "replace")
        self._spaces, self._suffix = (spelling.strip, spelling.suffix) if spelling else (0, b"")
        self._pending = b""  # a suffix, which is emitted only when another token follows
        self._ids: list[int] = []  # previous ids, for decoders that need context

    def push(self, id: int) -> str:
        """Return the text that this id completes: any number of whole characters."""
        if id in self._hidden:
            return ""
        if self._token_bytes.spelling is None:
            return self._decode_in_window(check_id(id))
        content = self._token_bytes[id]
        if self._spaces:
            content, self._spaces = self._token_bytes.strip_leading(id, self._spaces)
        if self._suffix and content:
            content, self._pending = self._pending + content, b""
            if content.endswith(self._suffix):
                content, self._pending = content.removesuffix(self._suffix), self._suffix
        return self._utf8.decode(content)

    def flush(self) -> str:
        """Return the remaining text; an incomplete character becomes U+FFFD."""
        self._pending = b""
        return self._utf8.decode(b"", True)

    def _decode_in_window(self, id: int) -> str:
        """The text that the id adds to that of the previous ids."""
        self._ids = [*self._ids[-WINDOW:], id]
        before, after = (
            self._token_bytes.backend.decode(ids, skip_special_tokens=False) for ids in (self._ids[:-1], self._ids)
        )
        return after[len(before) :]
