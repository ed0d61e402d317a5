"""Every file format against the library it comes from."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from oneblock.errors import OneblockError
from oneblock.text import Tokenizer, byte_level, bytepairs, characters, sentencepiece, train_bpe

TEXTS = [
    "",
    "Hello world",
    " leading, trailing ",
    "  odd   spaces \n\n\t tabs\r\nand\u00a0no-break\u2003em  ",
    "x\n  \n y \n",
    "日本語のテキスト 中文 한국어 ไทย",
    "😀👩‍👩‍👧‍👦 é é ﬁ Ω ≈ 12345678 3.14",
    "def f(x):\n    return x ** 2  # ok\n\n\n\tif a != b: {}\n",
    "a" * 101 + " " * 55 + "\n" * 9 + "ab" * 30,
    "Привет мир שלום عليكم नमस्ते",
    "don't I'LL we'VE THEY'RE l'été naïve",
    "<|endoftext|> <s> </s> <|im_start|> [INST] <unk> <0x41>",
    "\x00\x01\x7f \ufeff \u200b \u2028",
]
letters = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


def tiktoken_of(path: Path, pattern: str) -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# The patterns as tiktoken and Llama 3 publish them, possessive quantifiers and all.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANKS = {
    "cl100k": ("tokenizers/tiktoken/cl100k_base.tiktoken", CL100K),
    "o200k": ("tokenizers/tiktoken/o200k_base.tiktoken", bytepairs.O200K),
    "llama3": ("tokenizers/llama3/tokenizer.model", LLAMA3),
}


@pytest.mark.parametrize("name", RANKS)
def test_rank_files_equal_tiktoken(name: str, data: Path) -> None:
    file, pattern = data / RANKS[name][0], RANKS[name][1]
    ours, theirs = Tokenizer.load(file), tiktoken_of(file, pattern)
    book = (data / "text/moby-dick.txt").read_text("utf-8")[:60_000]
    for text in [*TEXTS, book]:
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, disallowed_special=())
        assert ours.decode(ids) == text

    @settings(max_examples=150, deadline=None)
    @given(letters)
    def holds_for(text: str) -> None:
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, disallowed_special=())
        assert ours.decode(ids) == text

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 255), max_size=12))
    def any_bytes_decode_alike(ids: list[int]) -> None:
        assert ours.decode(ids) == theirs.decode(ids)  # the first 256 ranks are the single bytes

    holds_for()
    any_bytes_decode_alike()


def test_control_tokens_of_rank_files(data: Path) -> None:
    llama3 = Tokenizer.load(data / "tokenizers/llama3")
    assert (llama3.bos_id, llama3.eos_ids, llama3.vocab_size) == (128_000, (128_001,), 128_256)
    known = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
    assert [llama3.special[name] for name in known] == [128_006, 128_007, 128_008, 128_009, 128_010]
    assert llama3.encode("hi") == [128_000, *llama3.encode("hi", bos=False)]
    assert Tokenizer.load(data / "tokenizers/tiktoken/cl100k_base.tiktoken").special["<|endoftext|>"] == 100_257
    assert Tokenizer.load(data / "tokenizers/tiktoken/o200k_base.tiktoken").special["<|endoftext|>"] == 199_999


def test_llama2_equals_sentencepiece(data: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    file = data / "tokenizers/llama2/tokenizer.model"
    theirs = library.SentencePieceProcessor(model_file=str(file))
    ours = Tokenizer.load(file.parent)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, (2,), 32_000)
    book = (data / "text/alice.txt").read_text("utf-8")[:30_000]
    for text in [*TEXTS, book]:
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert ours.encode(text) == [1, *ids]

    @settings(max_examples=200, deadline=None)
    @given(letters)
    def holds_for(text: str) -> None:
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)

    holds_for()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "bare"])
@pytest.mark.parametrize("defined", [[], ["<extra>", "<e", "▁▁▁"]], ids=["plain", "defined"])
def test_trained_sentencepiece_models(kind: str, rule: str, prefix: bool, defined: list[str], tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    corpus = ["the cat sat on the mat", "a dog and a cat", "two  spaces, ﬁne ½ things"] * 40 + TEXTS[1:3]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "m"), vocab_size=320, model_type=kind,
        normalization_rule_name=rule, byte_fallback=True, user_defined_symbols=defined, minloglevel=2,
        hard_vocab_limit=False, remove_extra_whitespaces=rule != "identity", add_dummy_prefix=prefix,
    )  # fmt: skip
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = Tokenizer.load(tmp_path / "m.model")
    texts = ["the cat", "a dog sat", "ﬁne ½ things", "日本 unseen", "two  spaces here", "<s> </s>"]
    texts += [" a ", "  b", "", "the <extra> dog", "<extra>the<e cat", " <extra>  \n", "\n<e", "<unk><extra></s>"]
    for text in texts:
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from([*"bcdet <\n", "cat", "the", "<extra>", "<e", "</s>", "日", "½"]), max_size=12))
    def holds_for(parts: list[str]) -> None:
        assert ours.encode("".join(parts), bos=False) == theirs.encode("".join(parts))

    holds_for()


def test_gpt2_files(data: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    folder = data / "tokenizers/gpt2"
    ours = Tokenizer.load(folder)
    encoder = json.loads((folder / "encoder.json").read_text("utf-8"))
    back = {letter: byte for byte, letter in enumerate(bytepairs.byte_letters())}
    ranks = {bytes(back[c] for c in name): id for name, id in encoder.items() if name != "<|endoftext|>"}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, disallowed_special=())
        assert ours.decode(ids) == text
    assert ours.encode("a<|endoftext|>", special=True) == [64, 50_256]
    assert (ours.vocab_size, ours.eos_ids) == (50_257, (50_256,))
    assert Tokenizer.find(folder) == folder / "encoder.json"


def test_decoding_of_a_trained_llama(data: Path) -> None:
    folder = data / "weights/stories260k"
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    assert Tokenizer.load(folder).decode(expected["greedy_ids"]) == expected["greedy_text"]


@given(st.lists(st.text("ab", min_size=2, max_size=5), unique=True, max_size=12), st.text("ab", max_size=16))
@settings(max_examples=300, deadline=None)
def test_merges_of_random_ranks_equal_tiktoken(tokens: list[str], text: str) -> None:
    """Also of ranks that no training gives: tokens that come before their parts, or without them."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)} | {token.encode(): 256 + i for i, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("any", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})
    vocab = {"".join(bytepairs.byte_letters()[byte] for byte in token): rank for token, rank in ranks.items()}
    ours = Backend(models.BPE(vocab, bytepairs.merges_of(vocab), ignore_merges=True))
    assert ours.encode(text).ids == theirs.encode(text)


def test_llama3_tokens_without_merges_of_lower_rank(data: Path) -> None:
    file = data / RANKS["llama3"][0]
    ours, theirs = Tokenizer.load(file), tiktoken_of(file, LLAMA3)
    for text in (
        " благодаряscope благодаря první",  # noqa: RUF001
        "larındaki اختلsix",  # noqa: RUF001
        " ранішеátky diệtlaştır.matmul",  # noqa: RUF001
        ".:.:.:.:.: внутр",
    ):
        assert ours.encode(text, bos=False) == theirs.encode(text)


trained = train_bpe(["the cat sat on the mat. " * 20, "def f(x):\n    return x\n" * 9, "日本語 😀 "], 400)
made = {"bpe": trained, "bytes": byte_level()}


@pytest.mark.parametrize("name", made)
@given(text=letters)
@settings(max_examples=150, deadline=None)
def test_byte_level_round_trip(name: str, text: str) -> None:
    ids = made[name].encode(text)
    assert made[name].decode(ids) == text
    assert all(0 <= id < made[name].vocab_size for id in ids)


@given(st.text(alphabet="abc \nd😀é", min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_characters_round_trip(text: str) -> None:
    one = characters("abc \nd😀é")
    assert one.decode(one.encode(text)) == text
    assert len(one.encode(text)) == len(text)


def test_save_and_load(tmp_path: Path) -> None:
    for name, one in (*made.items(), ("characters", characters("hello\n"))):
        one.save(tmp_path / name)
        again = Tokenizer.load(tmp_path / name)
        assert again.encode("hello\nhello") == one.encode("hello\nhello")
        assert again.decode(again.encode("hello\n")) == "hello\n"
        assert (again.vocab_size, again.special, again.eos_ids) == (one.vocab_size, one.special, one.eos_ids)
    assert trained.vocab_size <= 400
    assert len(trained.encode("the cat sat")) < len("the cat sat")


BAD = {
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab"',
    "tokenizer.model": b"\x0a\xff\xff\xff\xff\x0f not a model",
    "x.tiktoken": b"IQ== 0\n???? x\n",
    "y.tiktoken": b"IQ== 0\n",
}


@pytest.mark.parametrize("name", BAD)
def test_broken_files_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(OneblockError, match=r"^[^\n]*get the file again[^\n]*$"):
        Tokenizer.load(tmp_path / name)


def test_every_truncation_of_a_sentencepiece_model_is_refused_or_smaller(data: Path, tmp_path: Path) -> None:
    whole = (data / "tokenizers/llama2/tokenizer.model").read_bytes()
    for size in (0, 1, 2, 17, 1000, 123_456):
        (tmp_path / "t.model").write_bytes(whole[:size])
        try:
            assert len(sentencepiece.read_model(tmp_path / "t.model").pieces) < 32_000
        except OneblockError as error:
            assert "\n" not in str(error)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(OneblockError, match=r"no tokenizer \(looked for tokenizer.json, "):
        Tokenizer.load(tmp_path)
    assert Tokenizer.find(tmp_path) is None
    ranks = b"".join(base64.b64encode(bytes([b])) + f" {b}\n".encode() for b in range(256))
    (tmp_path / "z.tiktoken").write_bytes(ranks)
    with pytest.raises(OneblockError, match="256 ranks; known are"):
        Tokenizer.load(tmp_path)


def test_unknown_characters_are_refused() -> None:
    one = characters("abc ")
    for text in ("abXc", "X"):
        with pytest.raises(OneblockError, match=rf"^character 'X' \(U\+0058, at position {text.index('X')}\)[^\n]*$"):
            one.encode(text)
    with_unknown = Backend(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    assert Tokenizer(with_unknown).encode("aXa") == [1, 0, 1]


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_and_pickles_encode_alike(copies: Callable[[Tokenizer], Tokenizer], data: Path) -> None:
    for one in (trained, characters("abc"), Tokenizer.load(data / "tokenizers/qwen2_5")):
        other = copies(one)
        assert other is not one
        assert other.encode("abc") == one.encode("abc")
        assert (other.special, other.eos_ids, other.chat_template) == (one.special, one.eos_ids, one.chat_template)
        assert other.definition() == one.definition()


def test_text_that_cannot_be_encoded() -> None:
    with pytest.raises(OneblockError, match="character 2 of the text is half of a surrogate pair"):
        trained.encode("ab\ud800")
    with pytest.raises(OneblockError, match="no beginning-of-text token"):
        trained.encode("a", bos=True)
    with pytest.raises(OneblockError, match="vocab_size is 100, but it must be an integer, at least 257"):
        train_bpe(["a"], 100)
    with pytest.raises(OneblockError, match="no text to take characters from"):
        characters("")
