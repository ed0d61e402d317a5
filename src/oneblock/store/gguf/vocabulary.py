"""A Tokenizer to a file's vocabulary: what its definition says, where llama.cpp has a place for that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from oneblock.errors import OneblockError
from oneblock.store.gguf.pretokenizers import CUTS, DIGIT, GPT2
from oneblock.store.gguf.tokenizer import ENDS, GGML, ROLES, TEMPLATE
from oneblock.text import Tokenizer
from oneblock.text.formats import read_token
from oneblock.text.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

Raw = dict[str, Any]
BYTES = re.compile(r"<0x[0-9A-F]{2}>")
OUT_OF_REACH = -1e6  # the score of what no merge makes


def write_tokenizer(tokenizer: Tokenizer | None, rows: int) -> Raw:
    """Settings for an embedding of so many rows. OneblockError where a file has no place for such a tokenizer."""
    if tokenizer is None:
        return {GGML + "model": "none"}
    if tokenizer.vocab_size > rows:
        raise OneblockError(f"the tokenizer has {tokenizer.vocab_size} ids, too many for the model's {rows} rows")
    definition = json.loads(tokenizer.definition())
    model = definition["model"]
    if model["type"] != "BPE" or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise OneblockError("GGUF has no place for this kind of tokenizer: export with --no-tokenizer")
    texts = {id: text for text, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(rows)]
    spelled = any(step["type"] == "ByteLevel" for step in steps(definition["decoder"]))
    found = _merged(definition) if spelled else _scored(definition, tokens)
    kinds = _kinds(definition, tokens, texts, [] if spelled else _patterns(definition))
    return found | {GGML + "tokens": tokens, GGML + "token_type": kinds} | _habits(tokenizer)


def steps(part: Raw | None) -> Iterator[Raw]:
    """The parts of a definition, one by one."""
    if part is not None and part["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(key) or []:
                yield from steps(inner)
    elif part is not None:
        yield part


def _kinds(definition: Raw, tokens: list[str], texts: dict[int, str], cut_out: list[str]) -> list[int]:
    """What each token is. `cut_out`: patterns of SentencePiece's user-defined pieces, and of places between letters."""
    model, kinds = definition["model"], [NORMAL if i in texts else UNUSED for i in range(len(tokens))]
    try:
        patterns = [re.compile(pattern) for pattern in cut_out]
    except re.error:
        raise OneblockError(f"GGUF has no place for the pattern {cut_out[0][:60]}: use --no-tokenizer") from None
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


def _patterns(definition: Raw) -> list[str]:
    """What a text is cut by, in turn."""
    found = []
    for step in steps(definition["pre_tokenizer"]):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            found.append(step["pattern"]["Regex"])
        elif step["type"] == "ByteLevel" and step.get("use_regex", True):
            found.append(GPT2)
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append(DIGIT)
    return found


def _merges(model: Raw) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _merged(definition: Raw) -> Raw:
    """Byte-level pairs."""
    model, patterns = definition["model"], tuple(_patterns(definition))
    if any(step.get("add_prefix_space") for step in steps(definition["pre_tokenizer"])):
        raise OneblockError("GGUF has no place for a tokenizer that puts a space before each text: use --no-tokenizer")
    fitting = [name for name, cut in CUTS.items() if cut.patterns == patterns]
    whole = [name for name in fitting if CUTS[name].whole == bool(model.get("ignore_merges"))]
    merges = [f"{left} {right}" for left, right in _merges(model)]
    if not fitting and merges:
        raise OneblockError(f"llama.cpp has no name for the pattern {str(patterns)[:60]}: use --no-tokenizer")
    found: Raw = {GGML + "model": "gpt2", GGML + "pre": (whole or fitting or ["gpt-2"])[0]}
    return found | ({GGML + "merges": merges} if merges else {})


def _scored(definition: Raw, tokens: list[str]) -> Raw:
    """SentencePiece's pairs: the earlier a merge, the higher its token's score."""
    normalizers, cuts = list(steps(definition["normalizer"])), list(steps(definition["pre_tokenizer"]))
    spaces = [s for s in normalizers if s["type"] == "Replace" and s.get("content") == SPACE]
    meta = [s for s in cuts if s["type"] == "Metaspace"]
    if not (spaces or meta) or any(s["type"] == "Precompiled" for s in normalizers):
        raise OneblockError("GGUF has no place for this kind of tokenizer: export with --no-tokenizer")
    order: dict[str, int] = {}
    for left, right in _merges(definition["model"]):
        order.setdefault(left + right, len(order))
    scores = [-float(order[text]) if text in order else OUT_OF_REACH for text in tokens]
    prefix = any(s["type"] == "Prepend" for s in normalizers) or any(s.get("prepend_scheme") != "never" for s in meta)
    squeeze = any(s["type"] == "Replace" and s["pattern"].get("Regex") == " {2,}" for s in normalizers)
    found: Raw = {GGML + "model": "llama", GGML + "pre": "default", GGML + "scores": scores}
    found[GGML + "add_space_prefix"] = prefix
    return found | ({GGML + "remove_extra_whitespaces": True} if squeeze else {})


def _habits(tokenizer: Tokenizer) -> Raw:
    """Roles, what begins and ends a text, chat templates."""
    found: Raw = {}
    for role, name in ROLES.items():
        text = read_token(tokenizer.config, f"{role}_token")
        id = None if text is None else tokenizer.backend.token_to_id(text)
        if id is not None:
            found[f"{GGML}{name}_token_id"] = id
    for name, id in zip(ENDS, tokenizer.eos_ids, strict=False):
        found[f"{GGML}{name}_token_id"] = id
    ids = tokenizer.encode("a")
    found[GGML + "add_bos_token"] = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    found[GGML + "add_eos_token"] = bool(tokenizer.eos_ids) and ids[-1:] == [tokenizer.eos_ids[0]]
    if tokenizer.chat_template:
        found[TEMPLATE] = tokenizer.chat_template
    if tokenizer.tool_template:
        found |= {f"{TEMPLATE}.tool_use": tokenizer.tool_template, f"{TEMPLATE}s": ["tool_use"]}
    return found
