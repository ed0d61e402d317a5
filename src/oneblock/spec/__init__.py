"""What a model is: an architecture as a tree of frozen dataclasses, and the published ones by name."""

from oneblock.spec.names import FAMILIES, MODELS, Model, spec
from oneblock.spec.parts import (
    Attention,
    Dynamic,
    Layer,
    Linear,
    Llama3,
    LongRope,
    Mlp,
    Moe,
    Norm,
    Positions,
    Rope,
    Scaling,
    Spec,
    Yarn,
)

__all__ = [
    "FAMILIES",
    "MODELS",
    "Attention",
    "Dynamic",
    "Layer",
    "Linear",
    "Llama3",
    "LongRope",
    "Mlp",
    "Model",
    "Moe",
    "Norm",
    "Positions",
    "Rope",
    "Scaling",
    "Spec",
    "Yarn",
    "spec",
]
