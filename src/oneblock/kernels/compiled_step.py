"""One token of every row as one compiled graph: no Python for each layer, and none made anew as the text grows.

The graph sees a cache as tensors alone. What changes from token to token (the column, the positions) is in tensors too,
and the lengths of the cache are left open, so that one program serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from oneblock.infer.cache import Held, KVCache, decoded, encoded
from oneblock.kernels.compiler import compiler_found, keep_compiled
from oneblock.model import Decoder
from oneblock.spec import Spec

SECONDS = 20.0  # that the compiler takes, where it has not kept the program
SAVED = (1e-4, 4e-4)  # seconds that a layer's Python and small operators take on CPUs and beside a GPU

PROGRAMS = 256  # that may be kept at a time, a few for each model
NUMBERS = count()  # of models

Inside = tuple[list[Held], list[Held], list[Tensor]]  # keys, values, positions: KVCache.tensors


class StaticCacheView:
    """A KVCache with room for one more token, as the model sees it inside the graph."""

    length, padded = 0, True  # so that who sees whom is asked of positions, never of shapes

    def __init__(self, inside: Inside, column: Tensor, kinds: list[int]):
        self.keys, self.values, self.marks = inside
        self.column, self.kinds = column, kinds

    def begin(self, positions: Tensor) -> None:
        for marks in self.marks:
            marks.index_copy_(1, self.column % marks.shape[1], positions)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(self.keys[layer], k), self._update(self.values[layer], v)

    def _update(self, held: Held, x: Tensor) -> Tensor:
        for into, part in zip(held, encoded(x, len(held) > 1), strict=True):
            into.index_copy_(2, self.column % into.shape[2], part)
        return decoded(held, x.dtype)

    def key_positions(self, layer: int) -> Tensor:
        return self.marks[self.kinds[layer]]

    def end(self) -> None:
        pass


class Compiled:
    """A model's step, compiled at its first use: ids (B, 1), positions (B or 1, 1), a cache -> logits (B, V)."""

    def __init__(self, model: Decoder):
        self.model, self.number = model, next(NUMBERS)
        self.opened: list[Tensor] | None = None  # the marks of the cache whose lengths were left open
        keep_compiled()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
        options = {"guard_filter_fn": of_form, "size_asserts": False, "cpp.threads": 1}
        options["triton.cudagraphs"] = model.device.type == "cuda"
        self.graph: Callable[..., Tensor] = torch.compile(self.step, fullgraph=True, options=options)

    def step(
        self, form: str, ids: Tensor, positions: Tensor, column: Tensor, inside: Inside, kinds: list[int]
    ) -> Tensor:
        """`form` says all that a program depends on beside what is left open: nothing else is checked at a call."""
        assert form  # what is not used is not checked
        cache = StaticCacheView(inside, column, kinds)
        return self.model.logits(self.model.hidden_states(ids, positions=positions, cache=cache)[:, -1])

    def __call__(self, ids: Tensor, positions: Tensor | None, cache: KVCache) -> Tensor:
        """Logits after one token of each row; the cache has it then."""
        column = torch.tensor([cache.length], device=ids.device)
        positions = column[None] if positions is None else positions
        cache.begin(positions)
        keys, values, marks = inside = cache.tensors()
        if self.opened is not marks:  # a cache's tensors are others once it has grown or lost rows
            self.opened = marks
            for x in (x for held in (*keys, *values) for x in held):
                leave_open(x, 2)
            for x in marks:
                leave_open(x, 1)
        for x in (ids, positions):
            leave_open(x)
        form = f"{self.number} {len(ids) > 1} {len(positions) > 1} {len(marks[0]) > 1} {cache.coded}"
        logits = self.graph(form, ids, positions, column, inside, cache.kinds)
        cache.end()
        return logits


def leave_open(x: Tensor, *dims: int) -> None:
    """Let these dimensions, and the rows where there are several, be anything in the program that is made."""
    if not hasattr(x, "_dynamo_dynamic_indices"):
        for dim in (*dims, *((0,) if x.shape[0] > 1 else ())):
            torch._dynamo.mark_dynamic(x, dim)


def of_form(guards: Sequence[Any]) -> list[bool]:
    """Of what a program would check at each call (a quarter of a millisecond), the form alone."""
    return [guard.name in ("form", "L['form']") for guard in guards]  # by torch's version


def pays(spec: Spec, tokens: int, device: torch.device) -> bool:
    """Whether so many tokens to come repay the compiler's SECONDS, by SAVED for each layer of each."""
    return compiler_found() and tokens * spec.n_layers * SAVED[device.type == "cuda"] > SECONDS
