"""llama.cpp's names for how byte-level vocabularies cut a text before merging."""

from __future__ import annotations

from dataclasses import dataclass

from oneblock.text.bytepairs import CL100K, LLAMA3, O200K, QWEN2

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"


@dataclass(frozen=True)
class Cut:
    """Patterns, each applied to what those before it left."""

    patterns: tuple[str, ...]
    whole: bool = False  # a piece that is a token becomes it, whether merges lead there or not
    nfc: bool = False  # characters and their accents are joined first


CUTS = {
    "gpt-2": Cut((GPT2,)),
    "llama-bpe": Cut((LLAMA3,), whole=True),
    "smaug-bpe": Cut((LLAMA3,)),
    "dbrx": Cut((CL100K,)),  # cl100k's; llama.cpp's own form differs in spaces at the very end alone
    "qwen2": Cut((QWEN2,), nfc=True),
    "gpt-4o": Cut((O200K,), whole=True),
    "smollm": Cut((DIGIT, GPT2)),
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "llama4": "gpt-4o"}
ALSO |= dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2"), "qwen2")
ALSO |= dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "exaone4"), "gpt-2")
ALSO |= dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm")
