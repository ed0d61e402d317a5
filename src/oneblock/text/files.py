"""The files a tokenizer may come from, and what else their folder says about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

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
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")  # classes whose two files are not cut by GPT-2's pattern


@dataclass
class Found:
    backend: Backend
    config: dict[str, Any]
    chat_template: str | None
    tool_template: str | None  # where tools are given
    ends: tuple[int, ...]  # ids that end a text, as the model's own files have them


def token(config: dict[str, Any], role: str) -> str | None:
    """The text of a token with a role: newer files write it as it is, older ones as a dict."""
    value = config.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def find(folder: Path) -> Path | None:
    """The file of a folder that says most. OneblockError where two say as much."""
    for kind in KINDS:
        matches = [sorted(folder.glob(pattern)) for pattern in kind]
        if all(matches):
            if len(matches[0]) > 1:
                names = ", ".join(file.name for file in matches[0])
                raise OneblockError(f"{folder} has several tokenizers ({names}): name the file")
            return matches[0][0]
    return None


def read(path: Path) -> Found:
    file = find(path) if path.is_dir() else path
    if file is None or not file.is_file():
        wanted = ", ".join(" + ".join(kind) for kind in KINDS)
        raise OneblockError(f"{path} has no tokenizer (looked for {wanted})")
    if file.read_bytes()[:24].startswith(b"version https://git-lfs"):
        raise OneblockError(f"{file} only points to a file in Git LFS: get the file itself (git lfs pull)")
    folder = file.parent
    config = _json(folder / "tokenizer_config.json")
    _roles(config, _json(folder / "special_tokens_map.json"))
    backend = _backend(file, config)
    _special(backend, config)
    _edges(backend, config)
    return Found(backend, config, *_templates(folder, config), _ends(folder))


def _backend(file: Path, config: dict[str, Any]) -> Backend:
    """The tokenizer of a file; what the file itself says of beginning and end joins the config."""
    if file.suffix == ".json" and file.name not in ("vocab.json", "encoder.json"):
        return _tokenizer_json(file)
    if file.suffix in (".json", ".bpe", ".txt"):
        return _vocab(file, config)
    if _is_ranks(file):
        return _ranks(file, config)
    backend, model = sentencepiece.from_sentencepiece(file, _named_special(config))
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    found = {role: model.pieces[i][0] for role, i in named.items() if 0 <= i < len(model.pieces)}
    _default(config, **found, add_bos_token="bos_token" in found, add_eos_token=False)
    return backend


def _vocab(file: Path, config: dict[str, Any]) -> Backend:
    """Vocabulary and merges, whichever of the two is named."""
    pairs = [(file.parent / kind[0], file.parent / kind[1]) for kind in KINDS if len(kind) == 2]
    own = [pair for pair in pairs if file in pair] or [(file, file)]
    missing = next((f for f in own[0] if not f.is_file()), None)
    if missing is not None:
        raise OneblockError(f"{file} goes with {missing.name}, which its folder lacks: get both files")
    backend = bytepairs.from_vocab(*own[0], qwen=config.get("tokenizer_class") in QWEN2)
    if backend.token_to_id("<|endoftext|>") is not None:
        _default(config, bos_token="<|endoftext|>", eos_token="<|endoftext|>", add_bos_token=False)
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
    named = {entry["content"]: id for id, entry in _listed(config).items()}
    backend = bytepairs.from_ranks(file, named)
    if backend.token_to_id("<|begin_of_text|>") is not None:
        _default(config, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", add_bos_token=True)
    elif backend.token_to_id("<|endoftext|>") is not None:
        _default(config, eos_token="<|endoftext|>")
    return backend


def _listed(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The config's own list of added tokens, by id."""
    listed = config.get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, dict) else ()
    named = ((int(id), e) for id, e in entries if id.isdigit() and isinstance(e, dict) and e.get("content"))
    return dict(sorted(named, key=lambda item: item[0]))


def _named_special(config: dict[str, Any]) -> list[str]:
    """The names of every token that the config calls special."""
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    names = [entry["content"] for entry in _listed(config).values() if entry.get("special")]
    names += [token(config, role) for role in ROLES] + (more if isinstance(more, list) else [])
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def _special(backend: Backend, config: dict[str, Any]) -> None:
    """Tokens that the config alone calls special, or alone has: the latter get the ids that follow."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [
        AddedToken(e["content"], **{key: bool(e[key]) for key in flags if key in e}) for e in _listed(config).values()
    ]
    known = {t.content for t in (*tokens, *backend.get_added_tokens_decoder().values()) if t.special}
    new = [name for name in _named_special(config) if name not in known]
    tokens += [AddedToken(name, normalized=False, special=True) for name in new]
    backend.add_tokens(tokens)  # in the order of their ids
    backend.add_special_tokens([t for t in tokens if t.special])


def _edges(backend: Backend, config: dict[str, Any]) -> None:
    """What begins and ends each text, where the config says so; else it is as the tokenizer's file has it."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos, eos = (token(config, f"{end}_token") if config.get(f"add_{end}_token") else None for end in ("bos", "eos"))
    ids = {name: backend.token_to_id(name) for name in (bos, eos) if name is not None}
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *(part.replace("$A", "$B") for part in single)]
    known = list(ids.items())
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=known)


def _ends(folder: Path) -> tuple[int, ...]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        config = _json(folder / name)
        inner = config.get("text_config")
        for ids in (config.get("eos_token_id"), inner.get("eos_token_id") if isinstance(inner, dict) else None):
            found += [id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int) and id >= 0]
    return tuple(dict.fromkeys(found))


def _default(config: dict[str, Any], **values: Any) -> None:
    for key, value in values.items():
        config.setdefault(key, value)


def _roles(config: dict[str, Any], special: dict[str, Any]) -> None:
    """special_tokens_map.json, which older folders have besides the config."""
    for role in ROLES:
        if config.get(role) is None and special.get(role) is not None:
            config[role] = special[role]


def _templates(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """chat_template.jinja, chat_template.json, or the config's own; of several named ones the default and tools'."""
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    named: dict[Any, Any] = {"default": found}
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    named |= {} if (own := _text(folder / "chat_template.jinja")) is None else {"default": own}
    named |= {} if (own := _text(folder / TOOL_TEMPLATE)) is None else {"tool_use": own}
    texts = {name: text for name, text in named.items() if isinstance(text, str)}
    return texts.get("default") or next(iter(texts.values()), None), texts.get("tool_use")


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8") if path.is_file() else None
    except UnicodeDecodeError:
        raise OneblockError(f"{path} is no text: get the file again") from None


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
