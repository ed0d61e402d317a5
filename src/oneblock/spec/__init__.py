"""What a model is: an architecture as a tree of frozen dataclasses, and the published ones by name.

`oneblock.spec("llama-3-8b")` is `spec` below: the module can be called.
"""

import sys
from types import ModuleType
from typing import Any

from oneblock.spec.names import FAMILIES, MODELS, Model, spec
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
    "spec",
]


class _Callable(ModuleType):
    def __call__(self, name: str, **changes: Any) -> Spec:
        return spec(name, **changes)


sys.modules[__name__].__class__ = _Callable
