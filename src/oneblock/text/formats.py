"""Read the tokenizer files of a folder, in any format, with the settings that stand beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from oneblock.errors import OneblockError
from oneblock.text import bytepairs, sentencepiece

# Formats in order of preference: names or patterns, all of which a folder must have.
FORMATS: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("*.model",),
    ("*.tiktoken",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
)
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")  # classes whose vocab.json goes with another pattern than GPT-2's


def read_token(config: dict[str, Any], role: str) -> str | None:
    """The token with a role, such as `eos_token`: newer files write a string, older ones a dict."""
    value = config.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def find_tokenizer(folder: Path) -> Path | None:
    """The folder's file of the preferred format. OneblockError where several files have it."""
    for patterns in FORMATS:
        matches = [sorted(folder.glob(pattern)) for pattern in patterns]
        if all(matches):
            if len(matches[0]) > 1:
                names = ", ".join(file.name for file in matches[0])
                raise OneblockError(f"{folder} has several tokenizers ({names}): give the path of one")
            return matches[0][0]
    return None


def read_tokenizer(path: Path) -> tuple[Backend, dict[str, Any], str | None, str | None, tuple[int, ...]]:
    """Backend, config, chat template, template for tools, and the end-of-text ids of the model's own files."""
    file = find_tokenizer(path) if path.is_dir() else path
    if file is None or not file.is_file():
        names = ", ".join(" + ".join(patterns) for patterns in FORMATS)
        raise OneblockError(f"{path} has no tokenizer (looked for {names})")
    if file.read_bytes()[:24].startswith(b"version https://git-lfs"):
        raise OneblockError(f"{file} is a Git LFS pointer, not the file: run git lfs pull")
    folder = file.parent
    config = _read_json(folder / "tokenizer_config.json")
    special_map = _read_json(folder / "special_tokens_map.json")  # older folders have it beside the config
    config |= {role: special_map[role] for role in ROLES if config.get(role) is None and special_map.get(role)}
    backend = _read_backend(file, config)
    apply_config(backend, config)
    return backend, config, *_read_templates(folder, config), _read_eos_ids(folder)


def _read_backend(file: Path, config: dict[str, Any]) -> Backend:
    """The tokenizer of a file. Missing keys of `config` about beginning and end of text are filled from the file."""
    if file.suffix == ".json" and file.name not in ("vocab.json", "encoder.json"):
        return _read_tokenizer_json(file)
    if file.suffix in (".json", ".bpe", ".txt"):
        return _read_vocab_and_merges(file, config)
    if _is_rank_file(file):
        return _read_ranks(file, config)
    model = sentencepiece.read_model(file)
    backend = sentencepiece.build_sentencepiece(model, special_names(config))
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    tokens = {role: model.pieces[id][0] for role, id in ids.items() if 0 <= id < len(model.pieces)}
    _set_defaults(config, **tokens, add_bos_token="bos_token" in tokens, add_eos_token=False)
    return backend


def _read_vocab_and_merges(file: Path, config: dict[str, Any]) -> Backend:
    """`file` is either of the two."""
    pairs = [(file.parent / patterns[0], file.parent / patterns[1]) for patterns in FORMATS if len(patterns) == 2]
    pair = next((pair for pair in pairs if file in pair), (file, file))
    missing = next((path for path in pair if not path.is_file()), None)
    if missing is not None:
        raise OneblockError(f"{file} needs {missing.name}, which is not in its folder: get both files")
    backend = bytepairs.from_vocab(*pair, qwen=config.get("tokenizer_class") in QWEN2)
    if backend.token_to_id("<|endoftext|>") is not None:
        _set_defaults(config, bos_token="<|endoftext|>", eos_token="<|endoftext|>", add_bos_token=False)
    return backend


def _read_tokenizer_json(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise OneblockError(f"{file} is not a valid tokenizer ({reason}): get the file again") from None


def _is_rank_file(file: Path) -> bool:
    """Whether it is tiktoken's: lines of base64 and a number. SentencePiece's begin with a tag and a length."""
    with file.open("rb") as f:
        head = f.read(256).split(b"\n")[0].split()
    return len(head) == 2 and head[1].isdigit()


def _read_ranks(file: Path, config: dict[str, Any]) -> Backend:
    special = {entry["content"]: id for id, entry in _added_tokens(config).items()}
    backend = bytepairs.from_ranks(file, special)
    if backend.token_to_id("<|begin_of_text|>") is not None:
        _set_defaults(config, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", add_bos_token=True)
    elif backend.token_to_id("<|endoftext|>") is not None:
        _set_defaults(config, eos_token="<|endoftext|>")
    return backend


def _added_tokens(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The config's `added_tokens_decoder`, in the order of the ids."""
    decoder = config.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    valid = ((int(id), e) for id, e in entries if id.isdigit() and isinstance(e, dict) and e.get("content"))
    return dict(sorted(valid, key=lambda item: item[0]))


def special_names(config: dict[str, Any]) -> list[str]:
    """Every token that the config calls special."""
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    names = [entry["content"] for entry in _added_tokens(config).values() if entry.get("special")]
    names += [read_token(config, role) for role in ROLES] + (more if isinstance(more, list) else [])
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def apply_config(backend: Backend, config: dict[str, Any]) -> None:
    """Add the special tokens and the beginning- and end-of-text rule of a tokenizer_config.json to the backend.

    Tokens that the backend's file lacks get the next free ids.
    """
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [
        AddedToken(entry["content"], **{key: bool(entry[key]) for key in flags if key in entry})
        for entry in _added_tokens(config).values()
    ]
    known = {t.content for t in (*tokens, *backend.get_added_tokens_decoder().values()) if t.special}
    new = [name for name in special_names(config) if name not in known]
    tokens += [AddedToken(name, normalized=False, special=True) for name in new]
    backend.add_tokens(tokens)  # in id order
    backend.add_special_tokens([t for t in tokens if t.special])
    _set_post_processor(backend, config)


def _set_post_processor(backend: Backend, config: dict[str, Any]) -> None:
    """Add beginning- and end-of-text tokens as the config says; without its keys the file's own rule stays."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos, eos = (
        read_token(config, f"{end}_token") if config.get(f"add_{end}_token") else None for end in ("bos", "eos")
    )
    ids = {name: backend.token_to_id(name) for name in (bos, eos) if name is not None}
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *(part.replace("$A", "$B") for part in single)]
    tokens = list(ids.items())
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The `eos_token_id` of generation_config.json and config.json."""
    eos_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        inner = config.get("text_config")
        for ids in (config.get("eos_token_id"), inner.get("eos_token_id") if isinstance(inner, dict) else None):
            eos_ids += [id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int) and id >= 0]
    return tuple(dict.fromkeys(eos_ids))


def _set_defaults(config: dict[str, Any], **values: Any) -> None:
    for key, value in values.items():
        config.setdefault(key, value)


def _read_templates(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The default chat template and the one for tools: from .jinja files, chat_template.json or the config."""
    own = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    named: dict[Any, Any] = {"default": own}
    if isinstance(own, list):
        named = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}
    for name, file in (("default", "chat_template.jinja"), ("tool_use", TOOL_TEMPLATE)):
        if (text := _read_text(folder / file)) is not None:
            named[name] = text
    texts = {name: text for name, text in named.items() if isinstance(text, str)}
    return texts.get("default") or next(iter(texts.values()), None), texts.get("tool_use")


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8") if path.is_file() else None
    except UnicodeDecodeError:
        raise OneblockError(f"{path} is not UTF-8 text: get the file again") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no file."""
    try:
        value = json.loads(_read_text(path) or "{}")
    except ValueError:
        raise OneblockError(f"{path} is not valid JSON: get the file again") from None
    if not isinstance(value, dict):
        raise OneblockError(f"{path} is not a JSON object: get the file again")
    return value
