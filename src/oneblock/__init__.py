"""Every decoder-only language model from GPT-1 to Llama 4 as one block written once, its architecture as data.

    llm = oneblock.load("path/or/org/name")
    llm.generate("Once upon a time", max_tokens=64).text

    spec = oneblock.get_spec("llama-3-8b")
    oneblock.plan_model(spec, context=8192).kv_bytes

Names are imported on first use: `import oneblock` is fast, and only what computes imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from oneblock.errors import OneblockError

if TYPE_CHECKING:
    from oneblock.infer.llm import LLM, Completion, load
    from oneblock.plan import Plan, plan_model
    from oneblock.spec import Spec, get_spec
    from oneblock.text import Tokenizer

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "OneblockError", "Plan", "Spec", "Tokenizer"]
__all__ += ["__version__", "get_spec", "load", "plan_model"]

HOMES = {
    "load": "oneblock.infer.llm",
    "LLM": "oneblock.infer.llm",
    "Completion": "oneblock.infer.llm",
    "Plan": "oneblock.plan",
    "plan_model": "oneblock.plan",
    "Spec": "oneblock.spec",
    "get_spec": "oneblock.spec",
    "Tokenizer": "oneblock.text",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'oneblock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
