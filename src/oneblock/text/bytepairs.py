"""GPT-2's and tiktoken's byte-level files as `tokenizers` objects: vocabulary and merges, or ranks alone."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from oneblock.errors import OneblockError

# The published patterns, without possessive quantifiers, which change speed alone.
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
# A rank file says neither its pattern nor its control tokens; the number of its ranks tells which one it is.
KNOWN: dict[int, tuple[str, dict[str, int]]] = {
    128_000: (LLAMA3, {name: 128_000 + i for i, name in enumerate(LLAMA3_SPECIAL)}),
    100_256: (CL100K, {name: 100_257 + i for i, name in enumerate(FIM)} | {"<|endofprompt|>": 100_276}),
    199_998: (O200K, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
}


@cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's printable letter for each byte: itself where it has a shape, else one from 256 on."""
    shapes = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in shapes else next(others)) for byte in range(256))


@cache
def _table() -> dict[int, str]:
    return dict(enumerate(byte_letters()))


def letters(token: bytes) -> str:
    return token.decode("latin-1").translate(_table())


def from_ranks(path: Path, named: Mapping[str, int] | None = None) -> Tokenizer:
    """A tiktoken file: one line a token, its bytes in base64 and its rank. `named`: control tokens, if known better."""
    ranks = read_ranks(path)
    if len(ranks) not in KNOWN:
        known = ", ".join(f"{n:,}" for n in sorted(KNOWN))
        raise OneblockError(f"{path} has {len(ranks):,} ranks, of no known tokenizer ({known}): give a tokenizer.json")
    pattern, special = KNOWN[len(ranks)]
    taken = set(ranks.values())
    special = {name: id for name, id in (named or {}).items() if id not in taken} or special
    vocab = {letters(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab | special, merges_of(vocab), ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return byte_level(tokenizer, pattern)


def byte_level(tokenizer: Tokenizer, pattern: str | None = None) -> Tokenizer:
    """Cut by a pattern (None: GPT-2's), then spell each piece in bytes."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise OneblockError(f"{path}, line {number}, is no token and rank: get the file again") from None
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise OneblockError(f"{path} lacks the single byte {missing}: get the file again")
    return ranks


def merges_of(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third one, in the order of the third's rank.

    tiktoken merges whatever neighbours make the token of the lowest rank, so each pair counts: of Llama 3's tokens
    678 are not what their own bytes under the lower ranks would merge to, yet longer words come by them.
    """
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        for i in range(1, len(token)):
            left = token[:i]
            if left in vocab and token[i:] in vocab:
                merges.append((left, token[i:]))
    return merges


def from_vocab(vocab_path: Path, merges_path: Path, qwen: bool = False) -> Tokenizer:
    """GPT-2's two files; GPT-1's too, whose words end in `</w>`; and Qwen's, of another pattern."""
    try:
        vocab = json.loads(vocab_path.read_text("utf-8"))
        lines = merges_path.read_text("utf-8").split("\n")
        merges: list[tuple[str, str]] = []
        for line in lines:
            if line.strip() and not line.startswith("#version"):
                left, right = line.split()
                merges.append((left, right))
    except ValueError:
        raise OneblockError(f"{vocab_path} and {merges_path} are no vocabulary and merges: get them again") from None
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
