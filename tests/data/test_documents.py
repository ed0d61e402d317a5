"""Documents of files, and their tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.data.documents import DocumentFormat, read_texts, split_text, tokenize
from oneblock.errors import OneblockError
from oneblock.text.train import characters, train_bpe
from oneblock.train.options import Sizes, Train
from oneblock.train.prepare import prepare


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\0def", "is not text"),
        (b"\xff\xfe\x01", "not UTF-8"),
        (b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        (None, "cannot read"),
    ],
)
def test_files_that_are_not_text(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OneblockError, match=message) as error:
        read_texts([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_files() -> None:
    with pytest.raises(OneblockError, match="--data"):
        read_texts([])


@given(st.text("ab \n", max_size=300), st.integers(1, 50))
def test_pieces_add_up_to_the_text(text: str, size: int) -> None:
    assert "".join(split_text(text, size)) == text


def test_pieces_do_not_change_the_tokens() -> None:
    text = "def f(x):\n    return x\n\n\nclass A:\n    b = 1\n    c = 'd'\n" * 40
    tokenizer = train_bpe([text], 300)
    whole = tokenizer.encode(text, bos=False)
    parts = [i for piece in split_text(text, 64) for i in tokenizer.encode(piece, bos=False)]
    assert len(list(split_text(text, 64))) > 10
    assert parts == whole


def test_every_text_ends_with_the_end_of_text() -> None:
    tokenizer = train_bpe(["hello hello"], 270)
    end = tokenizer.eos_ids[0]
    ids = tokenize(["hello", "hello hello"], tokenizer).parts[0].tolist()
    assert [i for i, id in enumerate(ids) if id == end] == [len(tokenizer.encode("hello", bos=False)), len(ids) - 1]
    assert "".join(tokenizer.decode([i]) for i in ids) == "hellohello hello"


def test_characters_round_trip() -> None:
    text = "naïve 日本 😀\n"
    tokenizer = characters(text)
    assert tokenizer.decode(tokenize([text], tokenizer).parts[0].tolist()) == text


def test_json_lines_and_separators_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("three|four")
    assert read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"]) == ["one", "two", "three|four"]
    assert read_texts([tmp_path / "b.txt"], DocumentFormat(separator="|")) == ["three", "four"]
    with pytest.raises(OneblockError, match=r"line 1 has no text in 'body' \(it has id, text\)"):
        read_texts([tmp_path / "a.jsonl"], DocumentFormat("body"))
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": " "}\n')
    with pytest.raises(OneblockError, match="document 2 is empty"):
        read_texts([tmp_path / "c.jsonl"])


def test_document_ends(tmp_path: Path) -> None:
    tokenizer = train_bpe(["hello hello"], 270)
    texts = ["hello", "hello hello"] * 100
    tokens = tokenize(texts, tokenizer)
    assert tokens.ends is not None
    starts = [0, *tokens.ends[:-1].tolist()]
    ids = [tokens.read(a, b - a).tolist() for a, b in zip(starts, tokens.ends.tolist(), strict=True)]
    assert [tokenizer.decode(document) for document in ids] == texts


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_training_reads_json_lines_as_data_prepare_does(suffix: str, tmp_path: Path) -> None:
    """`oneblock train --data x.jsonl` trains on the documents, not on the JSON."""
    path = tmp_path / f"x.{suffix}"
    lines = [json.dumps({"body": f"line {i} has words"}) for i in range(40)]
    path.write_text("\n".join(lines) if suffix == "jsonl" else "|".join(f"line {i} has words" for i in range(40)))
    options = Train(
        data=(path,), text_field="body", separator="|", context=8, sizes=Sizes(dim=16, n_layers=1, n_heads=2)
    )
    job = prepare(options)
    text = job.tokenizer.decode(job.texts[0].read(0, len(job.texts[0])).tolist())
    assert text.startswith("line 0 has wordsline 1 has words")
    assert job.texts[0].ends is not None
    assert len(job.texts[0].ends) > 30
