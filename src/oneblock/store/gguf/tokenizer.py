"""A GGUF file's vocabulary to a Tokenizer: byte-level BPE, or SentencePiece pieces with scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.store.gguf.metadata import shorten
from oneblock.text import Tokenizer
from oneblock.text import sentencepiece as sp
from oneblock.text.bytepairs import CL100K, LLAMA3, O200K, QWEN2
from oneblock.text.formats import apply_config, special_names

Values = Mapping[str, Any]
GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # unless the file says otherwise
EOS_ROLES = ("eos", "eot", "eom")
NONE = (None, "none", "no_vocab")
MAX_TOKEN = 1024  # letters: merges are found by trying every split of a token
KINDS = (sp.NORMAL, sp.UNKNOWN, sp.CONTROL, sp.USER_DEFINED, sp.UNUSED, sp.BYTE)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"


@dataclass(frozen=True)
class PreTokenizer:
    """Split patterns of a byte-level vocabulary, each applied to the pieces that those before it left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token becomes it, even where merges do not lead there
    nfc: bool = False  # Unicode normalization before the split


PRE_TOKENIZERS = {  # by llama.cpp's names
    "gpt-2": PreTokenizer((GPT2,)),
    "llama-bpe": PreTokenizer((LLAMA3,), ignore_merges=True),
    "smaug-bpe": PreTokenizer((LLAMA3,)),
    "dbrx": PreTokenizer((CL100K,)),  # llama.cpp's own form differs only in spaces at the very end
    "qwen2": PreTokenizer((QWEN2,), nfc=True),
    "gpt-4o": PreTokenizer((O200K,), ignore_merges=True),
    "smollm": PreTokenizer((DIGIT, GPT2)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "llama4": "gpt-4o"}
ALIASES |= dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2"), "qwen2")
ALIASES |= dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "exaone4"), "gpt-2")
ALIASES |= dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm")


def read_tokenizer(metadata: Values, rows: int) -> Tokenizer | None:
    """The tokenizer of a file whose embedding has so many rows; None if it has none."""
    model = metadata.get(GGML + "model")
    if model in NONE:
        return None
    if model not in ("llama", "gpt2"):
        raise OneblockError(f"its tokenizer is of the kind {shorten(model)}; supported are llama, gpt2 and none")
    tokens, kinds = _read_tokens(metadata, rows)
    templates = [metadata.get(key) for key in (TEMPLATE, f"{TEMPLATE}.tool_use")]
    chat_template, tool_template = (text if isinstance(text, str) else None for text in templates)
    try:
        config = _read_config(metadata, tokens)
        if model == "llama":
            backend = _build_sentencepiece(metadata, tokens, kinds, config)
        else:
            backend = _build_bpe(metadata, tokens, kinds)
        apply_config(backend, config)
        return Tokenizer(backend, config, chat_template or tool_template, tool_template, eos_ids(metadata) or ())
    except Exception as error:  # the library raises nothing narrower
        raise OneblockError(f"its tokenizer cannot be used ({' '.join(str(error).split())[:200]})") from error


def eos_ids(metadata: Values) -> list[int] | None:
    """The ids that end a sequence."""
    ids = (metadata.get(f"{GGML}{role}_token_id") for role in EOS_ROLES)
    return list(dict.fromkeys(id for id in ids if type(id) is int and 0 <= id < 1 << 24)) or None


def _read_tokens(metadata: Values, rows: int) -> tuple[list[str], list[int]]:
    tokens = metadata.get(GGML + "tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= rows:
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise OneblockError(f"has {count} tokens for an embedding of {rows} rows; download it again")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise OneblockError(f"has a token of more than {MAX_TOKEN} letters; download it again")
    kinds = _read_numbers(metadata, "token_type", len(tokens)) or [sp.NORMAL] * len(tokens)
    if not set(kinds) <= {0, *KINDS}:
        raise OneblockError(f"has tokens of the unknown kind {max(kinds)}; download it again")
    while kinds[-1] == sp.UNUSED and len(kinds) > 1:  # padding of the embedding
        kinds.pop()
    return tokens[: len(kinds)], [int(kind) or sp.NORMAL for kind in kinds]


def _read_numbers(metadata: Values, key: str, count: int) -> list[Any]:
    numbers = metadata.get(GGML + key)
    if numbers is None:
        return []
    if isinstance(numbers, list | str | int | float) or len(numbers) != count:
        raise OneblockError(f"{GGML}{key} is not a number for each of {count} tokens; download the file again")
    return numbers.tolist()


def _read_config(metadata: Values, tokens: list[str]) -> dict[str, Any]:
    """The tokenizer_config.json: the roles of tokens, and which of them are added to a text."""
    is_sentencepiece = metadata[GGML + "model"] == "llama"
    config: dict[str, Any] = {}
    for role, name in ROLES.items():
        id = metadata.get(f"{GGML}{name}_token_id", SENTENCEPIECE_IDS.get(role) if is_sentencepiece else None)
        if type(id) is int and 0 <= id < len(tokens):
            config[f"{role}_token"] = tokens[id]
    add_bos = is_sentencepiece or metadata.get(GGML + "pre") in ("llama-bpe", "llama3", "llama-v3")
    config["add_bos_token"] = bool(metadata.get(GGML + "add_bos_token", add_bos)) and "bos_token" in config
    config["add_eos_token"] = bool(metadata.get(GGML + "add_eos_token", False)) and "eos_token" in config
    return config


def _build_sentencepiece(metadata: Values, tokens: list[str], kinds: list[int], config: dict[str, Any]) -> Backend:
    scores = _read_numbers(metadata, "scores", len(metadata[GGML + "tokens"]))[: len(tokens)] or [0.0] * len(tokens)
    unk = metadata.get(GGML + "unknown_token_id")
    model = sp.Model(
        pieces=list(zip(tokens, scores, kinds, strict=True)),
        kind=sp.BPE,
        unk_id=unk if type(unk) is int else 0,
        add_prefix=bool(metadata.get(GGML + "add_space_prefix", True)),
        squeeze=bool(metadata.get(GGML + "remove_extra_whitespaces")),
    )
    return sp.build_sentencepiece(model, special_names(config))


def _build_bpe(metadata: Values, tokens: list[str], kinds: list[int]) -> Backend:
    """Byte-level BPE with the named pre-tokenizer."""
    name = metadata.get(GGML + "pre", "default")
    pre = PRE_TOKENIZERS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if pre is None:
        known = ", ".join(sorted([*PRE_TOKENIZERS, *ALIASES]))
        raise OneblockError(f"pre-tokenizer {shorten(name)} is not supported; supported are {known}")
    vocab = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != sp.UNUSED}
    merges = [_split_merge(merge) for merge in metadata.get(GGML + "merges") or []]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    backend.normalizer = normalizers.NFC() if pre.nfc else None
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    added_kinds = (sp.CONTROL, sp.UNKNOWN, sp.USER_DEFINED)
    added = [(text, kind) for text, kind in zip(tokens, kinds, strict=True) if kind in added_kinds]
    backend.add_tokens([AddedToken(text, normalized=False, special=kind != sp.USER_DEFINED) for text, kind in added])
    return backend


def _split_merge(merge: Any) -> tuple[str, str]:
    left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
    if not (left and space and right):
        raise OneblockError(f"the merge {str(merge)[:40]!r} is not a pair of tokens")
    return left, right
