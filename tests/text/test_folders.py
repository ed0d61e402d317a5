"""Tokenizer folders: save and load round trips, here and in transformers, and the settings beside the tokenizer."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from oneblock.errors import OneblockError
from oneblock.text import Tokenizer, bytepairs, train_bpe

TEXTS = [
    "Hello world",
    "  odd   spaces \n\n\t tabs\r\nand\u00a0no-break  ",
    "日本語 中文 😀👩‍👧 é don't I'LL 12345678 3.14",
    "def f(x):\n    return x ** 2  # ok\n",
    "a" * 101 + " " * 55 + "ab" * 30,
    "<|endoftext|> <s> </s> <|im_start|> [INST] <unk> <0x41>",
]
trained = train_bpe(["the cat sat on the mat. " * 20, "def f(x):\n    return x\n" * 9, "日本語 😀 "], 400)


@pytest.mark.parametrize("file", ["llama2", "llama3", "gpt2", "qwen2_5", "tiktoken/o200k_base.tiktoken"])
def test_transformers_reads_a_saved_folder(file: str, data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(data / "tokenizers" / file)
    ours.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert (again.special, again.eos_ids, again.bos_id) == (ours.special, ours.eos_ids, ours.bos_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == again.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert theirs.decode(ours.encode(text, bos=False)) == ours.decode(ids)
    flags = {token.content for token in theirs.added_tokens_decoder.values() if token.special}
    assert flags == {name for name, id in ours.special.items() if not ours.decode([id])}


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


LETTERS = {letter: i + 4 for i, letter in enumerate(bytepairs.byte_letters())}


def test_vocabulary_and_merges_with_roles_of_a_config(tmp_path: Path) -> None:
    """As in OPT, where only the config has the beginning- and end-of-text tokens."""
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3} | LETTERS | {"ab": 260}
    config = {"bos_token": {"content": "</s>"}, "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    folder = write(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\na b\n", tokenizer_config__json=config)
    one = Tokenizer.load(folder)
    assert one.encode("ab") == [1, 260]
    assert one.encode("ab", bos=False) == [260]
    assert one.decode([1, 260, 1, 2]) == "ab"
    assert one.encode("</s>", bos=False) == [LETTERS[c] for c in "</s>"]
    write(folder, tokenizer_config__json=config | {"add_bos_token": False, "add_eos_token": True})
    assert Tokenizer.load(folder / "merges.txt").encode("ab") == [260, 1]


def test_qwen_vocab_and_merges_use_its_own_pattern(tmp_path: Path, data: Path) -> None:
    source = json.loads((data / "tokenizers/qwen2_5/tokenizer.json").read_text("utf-8"))["model"]
    config = json.loads((data / "tokenizers/qwen2_5/tokenizer_config.json").read_text("utf-8"))
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in source["merges"])
    folder = write(tmp_path, vocab__json=source["vocab"], merges__txt=merges, tokenizer_config__json=config)
    ours, whole = Tokenizer.load(folder), Tokenizer.load(data / "tokenizers/qwen2_5")
    assert ours.special == whole.special
    for text in TEXTS:
        assert ours.encode(text) == whole.encode(text)


def test_eos_ids_of_config_files(tmp_path: Path) -> None:
    trained.save(tmp_path)
    write(tmp_path, generation_config__json={"eos_token_id": [7, 0, 9]}, config__json={"eos_token_id": 11})
    assert Tokenizer.load(tmp_path).eos_ids == (trained.special["<|endoftext|>"], 7, 9, 11)


def test_special_tokens_only_in_the_config(tmp_path: Path) -> None:
    trained.save(tmp_path)
    end = trained.vocab_size
    config = {
        "additional_special_tokens": ["<more>"],
        "added_tokens_decoder": {str(end): {"content": "<x>", "special": True}},
    }
    one = Tokenizer.load(write(tmp_path, tokenizer_config__json=config))
    assert (one.special["<x>"], one.special["<more>"], one.vocab_size) == (end, end + 1, end + 2)
    assert one.encode("a<x>", special=True)[-1] == end


def test_config_names_replace_llama3_control_tokens(tmp_path: Path, data: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(data / "tokenizers/llama3/tokenizer.model")
    names = {str(128_000 + i): {"content": f"<|name_{i}|>", "special": True} for i in range(256)}
    one = Tokenizer.load(write(tmp_path, tokenizer_config__json={"added_tokens_decoder": names}))
    assert one.special["<|name_8|>"] == 128_008
    assert one.vocab_size == 128_256


def test_ambiguous_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, a__tiktoken="IQ== 0\n", b__tiktoken="IQ== 0\n")
    with pytest.raises(OneblockError, match=r"several tokenizers \(a.tiktoken, b.tiktoken\): give the path of one"):
        Tokenizer.load(tmp_path)
    lonely = write(tmp_path / "lonely", vocab__json={})
    with pytest.raises(OneblockError, match=r"needs merges\.txt, which is not in its folder"):
        Tokenizer.load(lonely / "vocab.json")
    pointer = write(tmp_path / "lfs", tokenizer__json="version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(OneblockError, match="is a Git LFS pointer"):
        Tokenizer.load(pointer)


def test_training_on_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat " * 30)
    one = train_bpe([tmp_path / "a.txt", "on the mat " * 30], 280)
    assert one.decode(one.encode("the mat")) == "the mat"
    assert len(one.encode(" the cat sat on the mat")) == 6
    for name, content, said in (
        ("none", None, "No such file"),
        ("bad", b"\xff", "not UTF-8"),
        ("void", b"", "is empty"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(OneblockError, match=said):
            train_bpe([tmp_path / name], 280)


def test_a_full_disk_is_one_line_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OneblockError, match=r"^[^\n]*No space left on device[^\n]*$"):
        train_bpe(["other text " * 9], 300).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
