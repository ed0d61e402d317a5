"""The architecture of a model as a tree of frozen dataclasses, and the published models by name."""

from oneblock.spec.names import FAMILIES, MODELS, Model, get_spec
from oneblock.spec.parts import (
    Attention,
    DynamicNTK,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Mlp,
    Moe,
    Norm,
    Positions,
    Rope,
    RopeScaling,
    Spec,
    Yarn,
)

__all__ = [
    "FAMILIES",
    "MODELS",
    "Attention",
    "DynamicNTK",
    "Layer",
    "LinearScaling",
    "Llama3Scaling",
    "LongRope",
    "Mlp",
    "Model",
    "Moe",
    "Norm",
    "Positions",
    "Rope",
    "RopeScaling",
    "Spec",
    "Yarn",
    "get_spec",
]
