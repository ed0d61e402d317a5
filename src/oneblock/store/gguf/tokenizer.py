"""A file's vocabulary to a Tokenizer: put down as the files of a folder, and read as any other folder's."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.store.gguf.metadata import brief
from oneblock.store.gguf.pretokenizers import ALSO, CUTS, Cut
from oneblock.text import Tokenizer
from oneblock.text.formats import TOOL_TEMPLATE
from oneblock.text.sentencepiece import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

Settings = Mapping[str, Any]
GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
ENDS = ("eos", "eot", "eom")
NONE = (None, "none", "no_vocab")
LONGEST = 1024  # letters of a token: every way to cut one in two is tried
KINDS = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)


def read_tokenizer(settings: Settings, rows: int) -> Tokenizer | None:
    """The tokenizer of a file whose embedding has so many rows; None where it has none."""
    model = settings.get(GGML + "model")
    if model in NONE:
        return None
    if model not in ("llama", "gpt2"):
        raise OneblockError(f"its tokenizer is of the kind {brief(model)}; known are llama, gpt2 and none")
    tokens, kinds = _tokens(settings, rows)
    with TemporaryDirectory() as folder:
        try:
            (_put_pieces if model == "llama" else _put_merges)(Path(folder), settings, tokens, kinds)
            _put_habits(Path(folder), settings, tokens)
            return Tokenizer.load(folder)
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).replace(f"{folder}/", "").split())[:200]
            raise OneblockError(f"its tokenizer cannot be used ({reason})") from error


def ends(settings: Settings) -> list[int] | None:
    """The ids that end a text."""
    ids = (settings.get(f"{GGML}{role}_token_id") for role in ENDS)
    return list(dict.fromkeys(id for id in ids if type(id) is int and 0 <= id < 1 << 24)) or None


def _tokens(settings: Settings, rows: int) -> tuple[list[str], list[int]]:
    tokens = settings.get(GGML + "tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= rows:
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise OneblockError(f"has {count} tokens for an embedding of {rows} rows; get the file again")
    if max(map(len, tokens)) > LONGEST:
        raise OneblockError(f"has a token of more than {LONGEST} letters; get the file again")
    kinds = _numbers(settings, "token_type", len(tokens)) or [NORMAL] * len(tokens)
    if not set(kinds) <= {0, *KINDS}:
        raise OneblockError(f"has tokens of the unknown kind {max(kinds)}; get the file again")
    while kinds[-1] == UNUSED and len(kinds) > 1:  # what fills the embedding up
        kinds.pop()
    return tokens[: len(kinds)], [int(kind) or NORMAL for kind in kinds]


def _numbers(settings: Settings, key: str, count: int) -> list[Any]:
    found = settings.get(GGML + key)
    if found is None:
        return []
    if isinstance(found, list | str | int | float) or len(found) != count:
        raise OneblockError(f"{GGML}{key} is not a number for each of {count} tokens; get the file again")
    return found.tolist()


# ------------------------------------------------------------------ a vocabulary with scores


def _put_pieces(folder: Path, settings: Settings, tokens: list[str], kinds: list[int]) -> None:
    """tokenizer.model, by the field numbers of sentencepiece_model.proto."""
    scores = _numbers(settings, "scores", len(settings[GGML + "tokens"]))[: len(tokens)] or [0.0] * len(tokens)
    unk = settings.get(GGML + "unknown_token_id", 0)
    data = b"".join(_field(1, _piece(*piece)) for piece in zip(tokens, scores, kinds, strict=True))
    trainer = [_varint(3, BPE), _varint(40, unk if type(unk) is int else 0)]
    for number, role in ((41, "bos"), (42, "eos")):
        id = settings.get(f"{GGML}{role}_token_id", number - 40)
        trainer.append(_varint(number, id if type(id) is int and id < len(tokens) else len(tokens)))
    prefix, squeeze = settings.get(GGML + "add_space_prefix", True), settings.get(GGML + "remove_extra_whitespaces")
    normalizer = _varint(3, int(bool(prefix))) + _varint(4, int(bool(squeeze)))
    (folder / "tokenizer.model").write_bytes(data + _field(2, b"".join(trainer)) + _field(3, normalizer))


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, kind)


def _field(number: int, data: bytes) -> bytes:
    return _plain(number << 3 | 2) + _plain(len(data)) + data


def _varint(number: int, value: int) -> bytes:
    return _plain(number << 3) + _plain(value)


def _plain(value: int) -> bytes:
    """Seven bits a byte, lowest first; the last byte has no top bit."""
    value, found = value & (1 << 64) - 1, bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


# ------------------------------------------------------------------ a vocabulary with merges


def _put_merges(folder: Path, settings: Settings, tokens: list[str], kinds: list[int]) -> None:
    """tokenizer.json: byte-level pairs, cut first as the name of the cut says."""
    name = settings.get(GGML + "pre", "default")
    cut = CUTS.get(ALSO.get(name, name)) if isinstance(name, str) else None
    if cut is None:
        raise OneblockError(f"the cut {brief(name)} is not known; known are {', '.join(sorted([*CUTS, *ALSO]))}")
    vocab = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    merges = [_pair(merge) for merge in settings.get(GGML + "merges") or []]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=cut.whole))
    backend.normalizer = normalizers.NFC() if cut.nfc else None
    backend.pre_tokenizer = pre_tokenizer(cut)
    backend.decoder = decoders.ByteLevel()
    added = [(text, kind) for text, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    backend.add_tokens([AddedToken(text, normalized=False, special=kind != USER_DEFINED) for text, kind in added])
    backend.save(str(folder / "tokenizer.json"))


def pre_tokenizer(cut: Cut) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pair(merge: Any) -> tuple[str, str]:
    left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
    if not (left and space and right):
        raise OneblockError(f"the merge {str(merge)[:40]!r} is no pair of tokens")
    return left, right


# ------------------------------------------------------------------ what belongs to either


def _put_habits(folder: Path, settings: Settings, tokens: list[str]) -> None:
    """Roles of tokens, what begins and ends a text, chat templates."""
    config: dict[str, Any] = {}
    for role, name in ROLES.items():
        id = settings.get(f"{GGML}{name}_token_id")
        if type(id) is int and 0 <= id < len(tokens):
            config[f"{role}_token"] = tokens[id]
    llama = settings[GGML + "model"] == "llama" or settings.get(GGML + "pre") in ("llama-bpe", "llama3", "llama-v3")
    config["add_bos_token"] = bool(settings.get(GGML + "add_bos_token", llama)) and "bos_token" in config
    config["add_eos_token"] = bool(settings.get(GGML + "add_eos_token", False)) and "eos_token" in config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends(settings)}), "utf-8")
    for key, file in ((TEMPLATE, "chat_template.jinja"), (f"{TEMPLATE}.tool_use", TOOL_TEMPLATE)):
        if isinstance(settings.get(key), str):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(settings[key], "utf-8", newline="")
