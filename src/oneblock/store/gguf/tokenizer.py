"""A GGUF file's vocabulary to a Tokenizer: written as the files of a Hugging Face folder, then loaded from it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.store.gguf.metadata import shorten
from oneblock.text import Tokenizer
from oneblock.text.bytepairs import CL100K, LLAMA3, O200K, QWEN2
from oneblock.text.formats import TOOL_TEMPLATE
from oneblock.text.sentencepiece import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

Values = Mapping[str, Any]
GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
EOS_ROLES = ("eos", "eot", "eom")
NONE = (None, "none", "no_vocab")
MAX_TOKEN = 1024  # letters: merges are found by trying every split of a token
KINDS = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
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
    with TemporaryDirectory() as folder:
        try:
            (_write_sentencepiece if model == "llama" else _write_bpe)(Path(folder), metadata, tokens, kinds)
            _write_settings(Path(folder), metadata, tokens)
            return Tokenizer.load(folder)
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).replace(f"{folder}/", "").split())[:200]
            raise OneblockError(f"its tokenizer cannot be used ({reason})") from error


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
    kinds = _read_numbers(metadata, "token_type", len(tokens)) or [NORMAL] * len(tokens)
    if not set(kinds) <= {0, *KINDS}:
        raise OneblockError(f"has tokens of the unknown kind {max(kinds)}; download it again")
    while kinds[-1] == UNUSED and len(kinds) > 1:  # padding of the embedding
        kinds.pop()
    return tokens[: len(kinds)], [int(kind) or NORMAL for kind in kinds]


def _read_numbers(metadata: Values, key: str, count: int) -> list[Any]:
    numbers = metadata.get(GGML + key)
    if numbers is None:
        return []
    if isinstance(numbers, list | str | int | float) or len(numbers) != count:
        raise OneblockError(f"{GGML}{key} is not a number for each of {count} tokens; download the file again")
    return numbers.tolist()


# ------------------------------------------------------------------ SentencePiece: tokens with scores


def _write_sentencepiece(folder: Path, metadata: Values, tokens: list[str], kinds: list[int]) -> None:
    """Write tokenizer.model; field numbers are those of sentencepiece_model.proto."""
    scores = _read_numbers(metadata, "scores", len(metadata[GGML + "tokens"]))[: len(tokens)] or [0.0] * len(tokens)
    unk = metadata.get(GGML + "unknown_token_id", 0)
    data = b"".join(_field(1, _piece(*piece)) for piece in zip(tokens, scores, kinds, strict=True))
    trainer = [_varint(3, BPE), _varint(40, unk if type(unk) is int else 0)]
    for number, role in ((41, "bos"), (42, "eos")):
        id = metadata.get(f"{GGML}{role}_token_id", number - 40)
        trainer.append(_varint(number, id if type(id) is int and id < len(tokens) else len(tokens)))
    prefix, squeeze = metadata.get(GGML + "add_space_prefix", True), metadata.get(GGML + "remove_extra_whitespaces")
    normalizer = _varint(3, int(bool(prefix))) + _varint(4, int(bool(squeeze)))
    (folder / "tokenizer.model").write_bytes(data + _field(2, b"".join(trainer)) + _field(3, normalizer))


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, kind)


def _field(number: int, data: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(data)) + data


def _varint(number: int, value: int) -> bytes:
    return _encode_varint(number << 3) + _encode_varint(value)


def _encode_varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the last byte has no top bit."""
    value, data = value & (1 << 64) - 1, bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


# ------------------------------------------------------------------ byte-level BPE: tokens with merges


def _write_bpe(folder: Path, metadata: Values, tokens: list[str], kinds: list[int]) -> None:
    """Write tokenizer.json with the named pre-tokenizer."""
    name = metadata.get(GGML + "pre", "default")
    pre = PRE_TOKENIZERS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if pre is None:
        known = ", ".join(sorted([*PRE_TOKENIZERS, *ALIASES]))
        raise OneblockError(f"pre-tokenizer {shorten(name)} is not supported; supported are {known}")
    vocab = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    merges = [_split_merge(merge) for merge in metadata.get(GGML + "merges") or []]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    backend.normalizer = normalizers.NFC() if pre.nfc else None
    backend.pre_tokenizer = build_pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    added = [(text, kind) for text, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    backend.add_tokens([AddedToken(text, normalized=False, special=kind != USER_DEFINED) for text, kind in added])
    backend.save(str(folder / "tokenizer.json"))


def build_pre_tokenizer(pre: PreTokenizer) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _split_merge(merge: Any) -> tuple[str, str]:
    left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
    if not (left and space and right):
        raise OneblockError(f"the merge {str(merge)[:40]!r} is not a pair of tokens")
    return left, right


# ------------------------------------------------------------------ both


def _write_settings(folder: Path, metadata: Values, tokens: list[str]) -> None:
    """Write the roles of tokens, which of them are added to a text, and the chat templates."""
    config: dict[str, Any] = {}
    for role, name in ROLES.items():
        id = metadata.get(f"{GGML}{name}_token_id")
        if type(id) is int and 0 <= id < len(tokens):
            config[f"{role}_token"] = tokens[id]
    llama = metadata[GGML + "model"] == "llama" or metadata.get(GGML + "pre") in ("llama-bpe", "llama3", "llama-v3")
    config["add_bos_token"] = bool(metadata.get(GGML + "add_bos_token", llama)) and "bos_token" in config
    config["add_eos_token"] = bool(metadata.get(GGML + "add_eos_token", False)) and "eos_token" in config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids(metadata)}), "utf-8")
    for key, file in ((TEMPLATE, "chat_template.jinja"), (f"{TEMPLATE}.tool_use", TOOL_TEMPLATE)):
        if isinstance(metadata.get(key), str):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(metadata[key], "utf-8", newline="")
