"""One decode step as one compiled graph: no Python per layer, and no recompilation as sequences grow.

The graph reads the KV cache as plain tensors. What changes from token to token (the column, the positions) is in
tensors too, and the cache's lengths are dynamic dimensions, so one program serves all lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from oneblock.kernels.build import has_compiler, use_compile_cache
from oneblock.kernels.substitution import Structure
from oneblock.model import Cache, Decoder
from oneblock.spec import Spec

COMPILE_SECONDS = 20.0  # without a cached program
SAVED_SECONDS = (1e-4, 4e-4)  # per layer and token: Python and small operators on CPUs, and beside a GPU
MAX_PROGRAMS = 256  # that dynamo keeps at a time, a few per model

CacheTensors = tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]], list[Tensor]]  # keys, values, positions
PROGRAM_IDS = count()


class GraphCache(Cache, Protocol):
    """A KV cache whose tensors a graph can read and write."""

    kinds: list[int]  # which tensor of positions each layer uses
    dtype: torch.dtype

    @property
    def static_view(self) -> Callable[[CacheTensors, Tensor, list[int]], Any]:
        """The class of the cache inside the graph, built from (tensors, column, kinds)."""
        ...

    def tensors(self) -> CacheTensors:
        """Keys and values of each layer, and positions of each kind of layer; other tensors once it was resized."""
        ...


def decode_step(
    program: str,
    model: Decoder,
    ids: Tensor,
    positions: Tensor,
    column: Tensor,
    tensors: CacheTensors,
    view: Callable[..., Any],
    kinds: list[int],
) -> Tensor:
    """Logits (B, V) of one token per row. `program` encodes all other specialisation: the only guard checked."""
    assert program  # dynamo guards only what is used
    cache: Cache = view(tensors, column, kinds)
    return model.logits(model.hidden_states(ids, positions=positions, cache=cache)[:, -1])


class CompiledStep:
    """A model's decode step, compiled at first use and again after modules, specs or hooks of the model changed."""

    def __init__(self, model: Decoder):
        self.model, self.structure, self.program_id = model, Structure(model), next(PROGRAM_IDS)
        self.dynamic: list[Tensor] | None = None  # positions of the cache whose dimensions were marked dynamic
        use_compile_cache()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_PROGRAMS)
        options = {"guard_filter_fn": guard_on_program, "size_asserts": False, "cpp.threads": 1}
        options["triton.cudagraphs"] = model.device.type == "cuda"
        self.graph: Callable[..., Tensor] = torch.compile(decode_step, fullgraph=True, options=options)

    def __call__(self, ids: Tensor, positions: Tensor | None, cache: GraphCache) -> Tensor:
        """Append one token per row, ids (B, 1) at positions (B or 1, 1), to the cache; logits (B, V)."""
        if not self.structure.is_current():
            self.structure, self.program_id = Structure(self.model), next(PROGRAM_IDS)
        column = torch.tensor([cache.length], device=ids.device)
        positions = column[None] if positions is None else positions
        cache.begin(positions)
        keys, values, key_positions = tensors = cache.tensors()
        if self.dynamic is not key_positions:
            self.dynamic = key_positions
            for x in (x for layer in (*keys, *values) for x in layer):
                mark_dynamic(x, 2)
            for x in key_positions:
                mark_dynamic(x, 1)
        for x in (ids, positions):
            mark_dynamic(x)
        batched = f"{len(ids) > 1} {len(positions) > 1} {len(key_positions[0]) > 1}"
        program = f"{self.program_id} {batched} {cache.dtype} {max(map(len, keys))}"
        logits = self.graph(program, self.model, ids, positions, column, tensors, cache.static_view, cache.kinds)
        cache.end()
        return logits


def mark_dynamic(x: Tensor, *dims: int) -> None:
    """Compile for any size of these dimensions, and for any number of rows over one."""
    if not hasattr(x, "_dynamo_dynamic_indices"):
        for dim in (*dims, *((0,) if x.shape[0] > 1 else ())):
            torch._dynamo.mark_dynamic(x, dim)


def guard_on_program(guards: Sequence[Any]) -> list[bool]:
    """Keep one guard, on `program`: checking all of them takes a quarter of a millisecond per call."""
    return [guard.name in ("program", "L['program']") for guard in guards]  # by torch's version


def is_worth_compiling(spec: Spec, tokens: int, device: torch.device) -> bool:
    """Whether decoding so many tokens saves more time than compiling takes."""
    return has_compiler() and tokens * spec.n_layers * SAVED_SECONDS[device.type == "cuda"] > COMPILE_SECONDS
