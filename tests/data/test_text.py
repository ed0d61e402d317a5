from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.data.text import encode, pieces, read_texts
from oneblock.errors import OneblockError
from oneblock.text.train import characters, train_bpe


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\0def", "is not text"),
        (b"\xff\xfe\x01", "not UTF-8"),
        (b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        (None, "cannot read"),
    ],
)
def test_files_that_are_no_text(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OneblockError, match=said) as error:
        read_texts([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_files() -> None:
    with pytest.raises(OneblockError, match="--data"):
        read_texts([])


@given(st.text("ab \n", max_size=300), st.integers(1, 50))
def test_pieces_are_the_text(text: str, size: int) -> None:
    assert "".join(pieces(text, size)) == text


def test_pieces_do_not_change_the_tokens() -> None:
    text = "def f(x):\n    return x\n\n\nclass A:\n    b = 1\n    c = 'd'\n" * 40
    tokenizer = train_bpe([text], 300)
    whole = tokenizer.encode(text, bos=False)
    parts = [i for piece in pieces(text, 64) for i in tokenizer.encode(piece, bos=False)]
    assert len(list(pieces(text, 64))) > 10
    assert parts == whole


def test_every_text_ends_with_the_end_of_text() -> None:
    tokenizer = train_bpe(["hello hello"], 270)
    end = tokenizer.eos_ids[0]
    ids = encode(["hello", "hello hello"], tokenizer).tolist()
    assert [i for i, id in enumerate(ids) if id == end] == [len(tokenizer.encode("hello", bos=False)), len(ids) - 1]
    assert "".join(tokenizer.decode([i]) for i in ids) == "hellohello hello"


def test_characters_round_trip() -> None:
    text = "naïve 日本 😀\n"
    tokenizer = characters(text)
    assert tokenizer.decode(encode([text], tokenizer).tolist()) == text
