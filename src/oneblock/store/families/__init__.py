"""Hugging Face classes: how each writes its configuration and names its tensors. One module per group."""

from __future__ import annotations

from oneblock.store.families import gemma, gpt, llama, mistral, native, others, phi, qwen
from oneblock.store.name_tables import Family

# In the order in which a Spec looks for a class that can hold it: what most programs read comes first.
FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES[:1],
    *(family for module in (gpt, mistral, qwen, gemma, phi, others) for family in module.FAMILIES),
    *llama.FAMILIES[1:],
    *native.FAMILIES,
)
