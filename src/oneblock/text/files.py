"""The files a tokenizer may come from, and what else their folder says about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import processors

from oneblock.errors import OneblockError
from oneblock.text import bytepairs, sentencepiece

# The kinds in the order of preference: names or patterns, all of which a folder must have.
KINDS: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("*.model",),
    ("*.tiktoken",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
)


@dataclass
class Found:
    backend: Backend
    config: dict[str, Any]
    chat_template: str | None


def find(folder: Path) -> Path | None:
    """The file of a folder that says most."""
    for kind in KINDS:
        matches = [next(iter(sorted(folder.glob(pattern))), None) for pattern in kind]
        if all(matches):
            return matches[0]
    return None


def read(path: Path) -> Found:
    file = find(path) if path.is_dir() else path
    if file is None or not file.is_file():
        wanted = ", ".join(" + ".join(kind) for kind in KINDS)
        raise OneblockError(f"{path} has no tokenizer (looked for {wanted})")
    config = _json(file.parent / "tokenizer_config.json")
    backend = _backend(file, config)
    _roles(config, _json(file.parent / "special_tokens_map.json"))
    return Found(backend, config, _template(file.parent, config))


def _backend(file: Path, config: dict[str, Any]) -> Backend:
    """The tokenizer of a file; what the file itself says of beginning and end joins the config."""
    if file.suffix == ".json" and file.name not in ("vocab.json", "encoder.json"):
        return _tokenizer_json(file)
    if file.suffix in (".json", ".bpe", ".txt"):
        vocab = next(
            f
            for f in (file.parent / "encoder.json", file.parent / "vocab.json", file)
            if f.suffix == ".json" and f.is_file()
        )
        merges = next((f for f in (file.parent / "vocab.bpe", file.parent / "merges.txt") if f.is_file()), file)
        backend = bytepairs.from_vocab(vocab, merges)
        if backend.token_to_id("<|endoftext|>") is not None:
            _default(config, bos_token="<|endoftext|>", eos_token="<|endoftext|>", add_bos_token=False)
        return backend
    if _is_ranks(file):
        return _ranks(file, config)
    backend, model = sentencepiece.from_sentencepiece(file)
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    _default(config, **{role: model.pieces[i][0] for role, i in named.items() if 0 <= i < len(model.pieces)})
    _begin(backend, config)
    return backend


def _tokenizer_json(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise OneblockError(f"{file} is no tokenizer ({reason}): get the file again") from None


def _is_ranks(file: Path) -> bool:
    """tiktoken's files are lines of base64 and a number; SentencePiece's begin with a tag and a length."""
    with file.open("rb") as f:
        head = f.read(256).split(b"\n")[0].split()
    return len(head) == 2 and head[1].isdigit()


def _ranks(file: Path, config: dict[str, Any]) -> Backend:
    backend = bytepairs.from_ranks(file)
    if backend.token_to_id("<|begin_of_text|>") is not None:
        _default(config, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
        _begin(backend, config)
    else:
        _default(config, eos_token="<|endoftext|>")
    return backend


def _begin(backend: Backend, config: dict[str, Any]) -> None:
    """Let texts begin with the token that begins a text, unless the config says no."""
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos is None or not config.get("add_bos_token", True):
        return
    special = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=special
    )


def _default(config: dict[str, Any], **values: Any) -> None:
    for key, value in values.items():
        config.setdefault(key, value)


def _roles(config: dict[str, Any], special: dict[str, Any]) -> None:
    """special_tokens_map.json, which older folders have besides the config."""
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if config.get(role) is None and special.get(role) is not None:
            config[role] = special[role]


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json, or the config's own; of several named ones the default."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text("utf-8")
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        return named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise OneblockError(f"{path} is no JSON: get the file again") from None
    if not isinstance(found, dict):
        raise OneblockError(f"{path} holds no settings: get the file again")
    return found
