"""Name -> Spec: every family's builder and every published size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from oneblock.errors import OneblockError
from oneblock.spec.families import cohere, gemma, gpt, gpt_oss, llama, mistral, olmo, phi, qwen
from oneblock.spec.parts import Spec


@dataclass(frozen=True)
class Model:
    """A published model: `FAMILIES[family](**kwargs)` is its Spec."""

    name: str
    title: str
    family: str
    kwargs: dict[str, Any]


FAMILIES: dict[str, Callable[..., Spec]] = {
    "gpt1": gpt.gpt1,
    "gpt2": gpt.gpt2,
    "gpt3": gpt.gpt3,
    "gpt_neo": gpt.gpt_neo,
    "opt": gpt.opt,
    "gpt_neox": gpt.gpt_neox,
    "llama": llama.llama,
    "mistral": mistral.mistral,
    "mixtral": mistral.mixtral,
    "qwen2": qwen.qwen2,
    "qwen2_moe": qwen.qwen2_moe,
    "qwen3": qwen.qwen3,
    "qwen3_moe": qwen.qwen3_moe,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3,
    "phi": phi.phi,
    "phi3": phi.phi3,
    "smollm3": llama.smollm3,
    "olmo2": olmo.olmo2,
    "cohere2": cohere.cohere2,
    "gpt_oss": gpt_oss.gpt_oss,
    "mllama": llama.mllama,
    "llama4": llama.llama4,
}

MODELS: dict[str, Model] = {
    name: Model(name, *row)
    for family in (gpt, llama, mistral, qwen, gemma, phi, olmo, cohere, gpt_oss)
    for name, row in family.SIZES.items()
}


def get_spec(name: str, **changes: Any) -> Spec:
    """The Spec of a model (`"llama-3-8b"`), or of a family at its small default size (`"llama"`).

    `changes` are the family builder's keywords: `get_spec("gpt2", n_layers=2)`. A name that is both is the model.
    """
    model = MODELS.get(name.lower())
    family = model.family if model else name.lower().replace("-", "_")
    if family not in FAMILIES:
        raise OneblockError(_unknown("model", name, (*MODELS, *FAMILIES)) + " (oneblock models lists them)")
    build = FAMILIES[family]
    known = inspect.signature(build).parameters
    for key in changes:
        if key not in known:
            raise OneblockError(_unknown(f"{family} keyword", key, tuple(known)))
    return build(**{**(model.kwargs if model else {}), **changes})


def _unknown(what: str, word: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(word.lower(), known, n=1, cutoff=0.4)
    return f"unknown {what} {word!r}" + (f": did you mean {near[0]!r}?" if near else "")
