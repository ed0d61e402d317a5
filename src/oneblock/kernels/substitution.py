"""Replacing the modules and tensors of a finished model, and noticing that somebody did."""

from __future__ import annotations

from operator import attrgetter, eq
from typing import Any

from torch import Tensor, nn


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule with this dotted name."""
    owner, _, key = name.rpartition(".")
    setattr(root.get_submodule(owner), key, new)


def set_tensor(root: nn.Module, name: str, new: Tensor | None) -> None:
    """Put `new` in the place of the parameter or buffer with this dotted name."""
    owner, _, key = name.rpartition(".")
    setattr(root.get_submodule(owner), key, new)


def as_subclass(module: nn.Module, subclass: type[nn.Module]) -> nn.Module:
    """Return a `subclass` instance with the parameters, submodules, hooks and attributes of `module`."""
    new = subclass.__new__(subclass)
    vars(new).update(vars(module))
    return new


class Structure:
    """A snapshot of a model's submodules, specs, hooks and attention backend: all that a compiled graph depends on.

    It holds the submodules that it compares, so whoever keeps it must not outlive the model.
    """

    def __init__(self, root: nn.Module):
        modules = list(root.modules())
        self._children = [vars(m)["_modules"] for m in modules if vars(m)["_modules"]]
        self._snapshot = [dict(children) for children in self._children]
        self._root, self._backend = root, getattr(root, "attention_backend", None)
        self._with_spec = [m for m in modules if "spec" in vars(m)]
        self._specs = self._read_specs()
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        self._hooks = [vars(m)[name] for m in modules for name in hooks]
        self._n_hooks = sum(map(len, self._hooks))

    def _read_specs(self) -> list[Any]:
        return list(map(attrgetter("spec"), self._with_spec))

    def is_current(self) -> bool:
        """Whether nothing was replaced since; about 15 us for 16 layers."""
        return (
            all(map(eq, self._children, self._snapshot))
            and sum(map(len, self._hooks)) == self._n_hooks
            and getattr(self._root, "attention_backend", None) == self._backend
            and all(map(lambda a, b: a is b, self._read_specs(), self._specs))
        )
