"""`oneblock tokenizer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oneblock import cli
from oneblock.errors import OneblockError
from oneblock.text import Tokenizer
from oneblock.text.commands import TokenizerOptions, tokenizer


def test_train_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 40)
    tokenizer(TokenizerOptions(train=(tmp_path / "a.txt",), vocab=270, out=tmp_path / "out"))
    assert "269 tokens in" in capsys.readouterr().out  # the text has no more pairs to merge
    one = Tokenizer.load(tmp_path / "out")
    for special in (False, True):
        text = " the cat<|endoftext|>"
        tokenizer(TokenizerOptions(model=tmp_path / "out", text=text, special=special, json=True))
        shown = json.loads(capsys.readouterr().out)
        assert shown["ids"] == one.encode(text, special=special)
        assert len(shown["tokens"]) == len(shown["ids"])
    tokenizer(TokenizerOptions(model=tmp_path / "out", text=" the cat"))
    out = capsys.readouterr().out
    assert " the cat" in out
    assert f"{len(one.encode(' the cat'))} tokens, 8 bytes; vocabulary 269" in out


def test_missing_options_are_named(tmp_path: Path) -> None:
    for options, message in (
        (TokenizerOptions(), "nothing to do"),
        (TokenizerOptions(train=(tmp_path / "a",)), "add --out FOLDER"),
        (TokenizerOptions(train=(tmp_path / "a",), out=tmp_path), "No such file"),
        (TokenizerOptions(model=tmp_path, text="x"), "has no tokenizer"),
    ):
        with pytest.raises(OneblockError, match=message):
            tokenizer(options)


@pytest.mark.parametrize("vocab", ["0", "-5", "256", "2000000"])
def test_vocabulary_sizes_are_checked(vocab: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    argv = ["tokenizer", "--train", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--vocab", vocab]
    assert cli.main(argv) == 2
    assert "must be an integer, at least 257 and at most 1,048,576" in capsys.readouterr().err
