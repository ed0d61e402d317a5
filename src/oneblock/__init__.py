"""Every decoder-only language model from GPT-1 to Llama 4 as one block written once, its architecture as data.

    llm = oneblock.load("path/or/org/name")
    llm.generate("Once upon a time", max_tokens=64).text

    oneblock.spec("llama-3-8b"); oneblock.plan(oneblock.spec("llama-3-8b"), context=8192)

Names are imported when they are first used: `import oneblock` costs nothing, and only what computes imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from oneblock.errors import OneblockError

if TYPE_CHECKING:
    from oneblock.infer.llm import LLM, Completion, load
    from oneblock.spec import Spec
    from oneblock.text import Tokenizer

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "OneblockError", "Spec", "Tokenizer", "__version__", "load"]

HOMES = {
    "load": "oneblock.infer.llm",
    "LLM": "oneblock.infer.llm",
    "Completion": "oneblock.infer.llm",
    "Spec": "oneblock.spec",
    "Tokenizer": "oneblock.text",
}
PACKAGES = ("spec", "plan")  # which can be called: each has the function of its own name


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return importlib.import_module(f"oneblock.{name}")
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'oneblock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *PACKAGES])
