"""A Tokenizer to the vocabulary of a GGUF file, if llama.cpp can express its definition."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from oneblock.errors import OneblockError
from oneblock.store.gguf.tokenizer import DIGIT, EOS_ROLES, GGML, GPT2, PRE_TOKENIZERS, ROLES, TEMPLATE
from oneblock.text import Tokenizer
from oneblock.text.formats import read_token
from oneblock.text.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

Raw = dict[str, Any]
BYTES = re.compile(r"<0x[0-9A-F]{2}>")
UNREACHABLE = -1e6  # the score of a token that no merge makes


def write_tokenizer(tokenizer: Tokenizer | None, rows: int) -> Raw:
    """The metadata for an embedding of so many rows. OneblockError if GGUF cannot express the tokenizer."""
    if tokenizer is None:
        return {GGML + "model": "none"}
    if tokenizer.vocab_size > rows:
        raise OneblockError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the embedding's {rows}; use --no-tokenizer"
        )
    definition = json.loads(tokenizer.definition())
    model = definition["model"]
    if model["type"] != "BPE" or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise OneblockError("GGUF cannot express this kind of tokenizer; export with --no-tokenizer")
    texts = {id: text for text, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(rows)]
    byte_level = any(step["type"] == "ByteLevel" for step in flatten_steps(definition["decoder"]))
    metadata = _bpe_metadata(definition) if byte_level else _sentencepiece_metadata(definition, tokens)
    kinds = _token_kinds(definition, tokens, texts, [] if byte_level else _split_patterns(definition))
    return metadata | {GGML + "tokens": tokens, GGML + "token_type": kinds} | _special_token_metadata(tokenizer)


def flatten_steps(part: Raw | None) -> Iterator[Raw]:
    """The steps of a part of tokenizer.json, sequences flattened."""
    if part is not None and part["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(key) or []:
                yield from flatten_steps(inner)
    elif part is not None:
        yield part


def _token_kinds(definition: Raw, tokens: list[str], texts: dict[int, str], user_defined: list[str]) -> list[int]:
    """The kind of each token. `user_defined`: patterns of SentencePiece's user-defined pieces."""
    model, kinds = definition["model"], [NORMAL if i in texts else UNUSED for i in range(len(tokens))]
    try:
        patterns = [re.compile(pattern) for pattern in user_defined]
    except re.error:
        raise OneblockError(
            f"GGUF cannot express the pattern {user_defined[0][:60]}; export with --no-tokenizer"
        ) from None
    for i, text in enumerate(tokens):
        if model.get("byte_fallback") and BYTES.fullmatch(text):
            kinds[i] = BYTE
        elif any(pattern.fullmatch(text) for pattern in patterns):
            kinds[i] = USER_DEFINED
    for added in definition["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = model.get("unk_token")
    if unknown in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN
    return kinds


def _split_patterns(definition: Raw) -> list[str]:
    """The split patterns, in order."""
    patterns = []
    for step in flatten_steps(definition["pre_tokenizer"]):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "ByteLevel" and step.get("use_regex", True):
            patterns.append(GPT2)
        elif step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
    return patterns


def _merges(model: Raw) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _bpe_metadata(definition: Raw) -> Raw:
    """The metadata of a byte-level BPE vocabulary."""
    model, patterns = definition["model"], tuple(_split_patterns(definition))
    if any(step.get("add_prefix_space") for step in flatten_steps(definition["pre_tokenizer"])):
        raise OneblockError(
            "GGUF cannot express a byte-level tokenizer with a prefix space; export with --no-tokenizer"
        )
    names = [name for name, pre in PRE_TOKENIZERS.items() if pre.patterns == patterns]
    exact = [name for name in names if PRE_TOKENIZERS[name].ignore_merges == bool(model.get("ignore_merges"))]
    merges = [f"{left} {right}" for left, right in _merges(model)]
    if not names and merges:
        raise OneblockError(f"llama.cpp has no name for the pattern {str(patterns)[:60]}; export with --no-tokenizer")
    metadata: Raw = {GGML + "model": "gpt2", GGML + "pre": (exact or names or ["gpt-2"])[0]}
    return metadata | ({GGML + "merges": merges} if merges else {})


def _sentencepiece_metadata(definition: Raw, tokens: list[str]) -> Raw:
    """The metadata of a SentencePiece vocabulary: the earlier a merge, the higher its token's score."""
    normalizers = list(flatten_steps(definition["normalizer"]))
    spaces = [s for s in normalizers if s["type"] == "Replace" and s.get("content") == SPACE]
    metaspace = [s for s in flatten_steps(definition["pre_tokenizer"]) if s["type"] == "Metaspace"]
    if not (spaces or metaspace) or any(s["type"] == "Precompiled" for s in normalizers):
        raise OneblockError("GGUF cannot express this kind of tokenizer; export with --no-tokenizer")
    ranks: dict[str, int] = {}
    for left, right in _merges(definition["model"]):
        ranks.setdefault(left + right, len(ranks))
    prefix = any(s["type"] == "Prepend" for s in normalizers)
    prefix = prefix or any(s.get("prepend_scheme") != "never" for s in metaspace)
    squeeze = any(s["type"] == "Replace" and s["pattern"].get("Regex") == " {2,}" for s in normalizers)
    metadata: Raw = {GGML + "model": "llama", GGML + "pre": "default"}
    metadata[GGML + "scores"] = [-float(ranks[text]) if text in ranks else UNREACHABLE for text in tokens]
    metadata[GGML + "add_space_prefix"] = prefix
    return metadata | ({GGML + "remove_extra_whitespaces": True} if squeeze else {})


def _special_token_metadata(tokenizer: Tokenizer) -> Raw:
    """The roles of tokens, which of them are added to a text, and the chat templates."""
    metadata: Raw = {}
    for role, name in ROLES.items():
        text = read_token(tokenizer.config, f"{role}_token")
        id = None if text is None else tokenizer.backend.token_to_id(text)
        if id is not None:
            metadata[f"{GGML}{name}_token_id"] = id
    for name, id in zip(EOS_ROLES, tokenizer.eos_ids, strict=False):
        metadata[f"{GGML}{name}_token_id"] = id
    ids = tokenizer.encode("a")
    metadata[GGML + "add_bos_token"] = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    metadata[GGML + "add_eos_token"] = bool(tokenizer.eos_ids) and ids[-1:] == [tokenizer.eos_ids[0]]
    if tokenizer.chat_template:
        metadata[TEMPLATE] = tokenizer.chat_template
    if tokenizer.tool_template:
        metadata |= {f"{TEMPLATE}.tool_use": tokenizer.tool_template, f"{TEMPLATE}s": ["tool_use"]}
    return metadata
