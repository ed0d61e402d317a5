"""GPT-2's and tiktoken's byte-level files as `tokenizers` objects: vocabulary and merges, or ranks alone."""

from __future__ import annotations

import base64
import binascii
import json
from functools import cache
from itertools import pairwise
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


def letters(token: bytes) -> str:
    table = byte_letters()
    return "".join(table[byte] for byte in token)


def from_ranks(path: Path) -> Tokenizer:
    """A tiktoken file: one line a token, its bytes in base64 and its rank."""
    ranks = read_ranks(path)
    if len(ranks) not in KNOWN:
        known = ", ".join(f"{n:,}" for n in sorted(KNOWN))
        raise OneblockError(f"{path} has {len(ranks):,} ranks, of no known tokenizer ({known}): give a tokenizer.json")
    pattern, special = KNOWN[len(ranks)]
    vocab = {letters(token): rank for token, rank in ranks.items()} | special
    merges = [(letters(a), letters(b)) for a, b in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
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


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts each token is merged from, in the order of their ranks.

    tiktoken merges whatever neighbours make the token of the lowest rank. Within one token nothing outside takes
    part, so its last merge is always the same one: that of the token's own bytes under the lower ranks.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merged(token, ranks, rank)
            if len(parts) == 2:  # else no merges lead to it: only a piece that is the whole token becomes it
                merges.append((parts[0], parts[1]))
    return merges


def merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The token's bytes after every merge of a lower rank."""
    if len(token) == 2:
        return [token[:1], token[1:]]
    ends = list(range(len(token) + 1))  # part i is token[ends[i]:ends[i + 1]]
    get = ranks.get
    costs = [get(token[i : i + 2], below) for i in range(len(token) - 1)]  # of joining parts i and i + 1
    while costs:
        best = min(costs)
        if best >= below:
            break
        i = costs.index(best)
        del ends[i + 1], costs[i]
        if i < len(costs):
            costs[i] = get(token[ends[i] : ends[i + 2]], below)
        if i > 0:
            costs[i - 1] = get(token[ends[i - 1] : ends[i + 1]], below)
    return [token[a:b] for a, b in pairwise(ends)]


def from_vocab(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """GPT-2's two files; GPT-1's too, whose words end in `</w>`."""
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
    return byte_level(tokenizer)


def _gpt1(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer
