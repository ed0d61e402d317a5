"""`oneblock tokenizer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oneblock.errors import OneblockError
from oneblock.text import Tokenizer
from oneblock.text.commands import Options, tokenizer


def test_train_then_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 40)
    tokenizer(Options(train=(tmp_path / "a.txt",), vocab=270, out=tmp_path / "out"))
    assert "269 ids in" in capsys.readouterr().out  # the text has no more pairs to merge
    one = Tokenizer.load(tmp_path / "out")
    for special in (False, True):
        text = " the cat<|endoftext|>"
        tokenizer(Options(model=tmp_path / "out", text=text, special=special, json=True))
        shown = json.loads(capsys.readouterr().out)
        assert shown["ids"] == one.encode(text, special=special)
        assert len(shown["tokens"]) == len(shown["ids"])
    tokenizer(Options(model=tmp_path / "out", text=" the cat"))
    out = capsys.readouterr().out
    assert " the cat" in out
    assert f"{len(one.encode(' the cat'))} tokens, 8 bytes; 269 ids" in out


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for options, said in (
        (Options(), "nothing to do"),
        (Options(train=(tmp_path / "a",)), "add --out FOLDER"),
        (Options(train=(tmp_path / "a",), out=tmp_path), "No such file"),
        (Options(model=tmp_path, text="x"), "has no tokenizer"),
    ):
        with pytest.raises(OneblockError, match=said):
            tokenizer(options)
