"""Name -> Spec: every family's builder and every published size."""

from __future__ import annotations

from typing import Any

from oneblock.errors import OneblockError
from oneblock.spec.build import Builder, Model, unknown_name
from oneblock.spec.families import cohere, gemma, gpt, gpt_oss, llama, mistral, olmo, phi, qwen, stablelm
from oneblock.spec.parts import Spec

MODULES = (gpt, llama, mistral, qwen, gemma, phi, olmo, cohere, gpt_oss, stablelm)
FAMILIES: dict[str, Builder] = {
    each.name: each for module in MODULES for each in vars(module).values() if isinstance(each, Builder)
}
MODELS: dict[str, Model] = {each.name: each for module in MODULES for each in module.MODELS}


def get_spec(name: str, **changes: Any) -> Spec:
    """The Spec of a model (`"llama-3-8b"`), or of a family at its small default size (`"llama"`).

    `changes` are the family builder's keywords: `get_spec("gpt2", n_layers=2)`. A name that is both is the model.
    """
    model = MODELS.get(name.lower())
    family = model.family if model else name.lower().replace("-", "_")
    if family not in FAMILIES:
        raise OneblockError(unknown_name("model", name, (*MODELS, *FAMILIES)) + " (oneblock models lists them)")
    return FAMILIES[family](**{**(model.kwargs if model else {}), **changes})
