"""Byte-level BPE files as `tokenizers` backends: vocab.json with merges.txt (GPT-2), or ranks alone (tiktoken)."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from oneblock.errors import OneblockError

# The published pre-tokenization patterns, without possessive quantifiers, which change only speed.
CL100K = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
    )
)
LLAMA3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))),
)
FIM = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# A rank file contains neither its pattern nor its control tokens; the number of ranks identifies it.
KNOWN: dict[int, tuple[str, dict[str, int]]] = {
    128_000: (LLAMA3, {name: 128_000 + i for i, name in enumerate(LLAMA3_SPECIAL)}),
    100_256: (CL100K, {name: 100_257 + i for i, name in enumerate(FIM)} | {"<|endofprompt|>": 100_276}),
    199_998: (O200K, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
}


@cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's letter for each byte: the byte's own character if it is printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def from_ranks(path: Path, special: Mapping[str, int] | None = None) -> Tokenizer:
    """Read a tiktoken file. `special`: control tokens and ids that replace the published ones."""
    ranks = read_ranks(path)
    if len(ranks) not in KNOWN:
        known = ", ".join(f"{n:,}" for n in sorted(KNOWN))
        raise OneblockError(f"{path} has {len(ranks):,} ranks; known are {known}: use a tokenizer.json instead")
    pattern, published = KNOWN[len(ranks)]
    taken = set(ranks.values())
    special = {name: id for name, id in (special or {}).items() if id not in taken} or published
    letters = dict(enumerate(byte_letters()))
    vocab = {token.decode("latin-1").translate(letters): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab | special, merges_of(vocab), ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return byte_level(tokenizer, pattern)


def byte_level(tokenizer: Tokenizer, pattern: str | None = None) -> Tokenizer:
    """Set byte-level pre-tokenization by a pattern (None: GPT-2's), and the decoder."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file: each line has the bytes in base64 and the rank."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise OneblockError(f"{path}, line {number}, is not a token and a rank: get the file again") from None
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise OneblockError(f"{path} has no token for the byte {missing}: get the file again")
    return ranks


def merges_of(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that forms a third one, in the order of the third's rank.

    tiktoken merges the neighbours that form the token of the lowest rank, so every pair counts: 678 tokens of Llama 3
    are not what their own bytes merge to under the lower ranks, but longer words are built through them.
    """
    return [pair for token in sorted(vocab, key=vocab.__getitem__) for pair in token_splits(token, vocab)]


def token_splits(token: str, vocab: Container[str]) -> list[tuple[str, str]]:
    """The ways to split a token into two tokens: `ids` -> [("i", "ds"), ("id", "s")], where all four exist."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in vocab and right in vocab]


def from_vocab(vocab_path: Path, merges_path: Path, qwen: bool = False) -> Tokenizer:
    """Read GPT-2's two files, or GPT-1's (words end in `</w>`). `qwen`: with Qwen's pattern and NFC."""
    try:
        vocab = json.loads(vocab_path.read_text("utf-8"))
        merges: list[tuple[str, str]] = []
        for line in merges_path.read_text("utf-8").split("\n"):
            if line.strip() and not line.startswith("#version"):
                left, right = line.split()
                merges.append((left, right))
    except ValueError:
        raise OneblockError(f"{vocab_path} or {merges_path} is not valid: get both files again") from None
    if any(name.endswith("</w>") for name in vocab):
        return _gpt1(vocab, merges)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    special = [name for name in vocab if name.startswith("<|") and name.endswith("|>")]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.normalizer = normalizers.NFC() if qwen else None
    return byte_level(tokenizer, QWEN2 if qwen else None)


def _gpt1(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>",) if name in vocab])
    return tokenizer
