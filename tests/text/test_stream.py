"""Streaming: never half a character, and in the end the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from oneblock.errors import OneblockError
from oneblock.text import Tokenizer, byte_level, train_bpe

FILES = ("tokenizers/llama2", "tokenizers/qwen2_5", "weights/stories260k", "tokenizers/gpt2")
TEXT = "Once upon a time 日本語 😀👩‍👧 naïve\n\n  done "


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(id) for id in ids), stream.flush()]


@pytest.mark.parametrize("file", FILES)
def test_pieces_add_up(file: str, data: Path) -> None:
    tokenizer = Tokenizer.load(data / file)
    got = pieces(tokenizer, tokenizer.encode(TEXT))
    assert "".join(got) == tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert not any("\ufffd" in piece for piece in got)
    assert sum(map(bool, got)) > 5  # it does stream


@pytest.mark.parametrize("file", FILES)
def test_any_ids_equal_the_library_where_they_are_text(file: str, data: Path) -> None:
    tokenizer = Tokenizer.load(data / file)
    hidden = {id for id in tokenizer.special.values() if not tokenizer.decode([id])}

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    def holds_for(ids: list[int]) -> None:
        text = tokenizer.decode(ids)
        assert "".join(pieces(tokenizer, ids)) == text
        shown = [id for id in ids if id not in hidden]
        library = tokenizer.backend.decode(shown, skip_special_tokens=False)
        if "\ufffd" not in library:
            assert text == library

    holds_for()


def test_half_characters_wait() -> None:
    stream, smile = byte_level().stream(), "😀".encode()
    assert [stream.push(b) for b in smile] == ["", "", "", "😀"]
    assert [stream.push(b) for b in smile[:2]] == ["", ""]
    assert stream.push(ord("x")) == "\ufffdx"
    assert [stream.push(b) for b in smile[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@given(st.lists(st.integers(0, 255), max_size=30))
@settings(max_examples=200, deadline=None)
def test_bytes_decode_as_python_does(ids: list[int]) -> None:
    one = byte_level()
    assert "".join(pieces(one, ids)) == one.decode(ids) == bytes(ids).decode("utf-8", "replace")


def test_llama2_bytes_decode_as_sentencepiece_does(data: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    file = data / "tokenizers/llama2/tokenizer.model"
    ours, theirs = Tokenizer.load(file), library.SentencePieceProcessor(model_file=str(file))

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(3, 258) | st.sampled_from([29871, 259, 22172, 31999]), max_size=12))
    def holds_for(ids: list[int]) -> None:
        assert "".join(pieces(ours, ids)) == ours.decode(ids) == theirs.decode(ids)

    holds_for()


def test_end_of_word_suffixes() -> None:
    """GPT-1: the space after a word is emitted when another token follows."""
    backend = Backend(models.BPE({"un</w>": 0, "do": 1, "ing</w>": 2}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    assert pieces(Tokenizer(backend), [0, 1, 2]) == ["un", " do", "ing", ""]


def test_invalid_ids() -> None:
    for id in (-1, -100, 2**40, "a", None):
        with pytest.raises(OneblockError, match="is not a token id"):
            byte_level().decode([id])  # pyright: ignore[reportArgumentType]


def test_a_decoder_with_context() -> None:
    backend = Backend(models.WordLevel({"un": 0, "do": 1, "##ing": 2}, "un"))
    backend.decoder = decoders.WordPiece("##", cleanup=False)
    one, ids = Tokenizer(backend), [0, 1, 2, 0] * 9
    assert "".join(pieces(one, ids)) == one.decode(ids) == backend.decode(ids)
    assert backend.decode(ids[:4]) == "un doing un"


def test_decode_hides_control_tokens_by_default() -> None:
    one = train_bpe(["abc"], 300, ("<|end|>",))
    ids = one.encode("ab<|end|>c", special=True)
    assert one.special["<|end|>"] in ids
    assert (one.decode(ids), one.decode(ids, skip_special=False)) == ("abc", "ab<|end|>c")
    assert one.decode([99_999, *ids]) == "abc"
