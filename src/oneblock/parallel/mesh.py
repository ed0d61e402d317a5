"""Degrees of parallelism, parsed from `dp=8 tp=4 cp=2`. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from oneblock.config import nearest
from oneblock.errors import OneblockError


@dataclass(frozen=True)
class Mesh:
    """Ranks along each dimension; their product is the world size. The last dimension has neighbouring ranks."""

    pp: int = 1  # pipeline stages (arXiv:1811.06965)
    dp: int = 1  # replicas of the model, each with its own rows of the batch
    ep: int = 1  # as dp, with experts sharded (arXiv:2006.16668)
    cp: int = 1  # parts of each sequence
    fsdp: int = 1  # as dp, with weights, gradients and optimizer state sharded (ZeRO-3, arXiv:1910.02054)
    tp: int = 1  # shards of each weight matrix (arXiv:1909.08053)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different rows."""
        return self.dp * self.ep * self.fsdp

    def __str__(self) -> str:
        return (
            " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1) or "dp=1"
        )


KEYS = tuple(f.name for f in fields(Mesh))


def parse_mesh(text: str, ranks: int) -> Mesh:
    """Parse a mesh; an empty text is pure data parallelism. OneblockError if it is malformed or not for `ranks`."""
    degrees: dict[str, int] = {}
    for part in re.split(r"[\s,]+", text.strip()) if text.strip() else ():
        key, _, value = part.partition("=")
        if key not in KEYS:
            raise OneblockError(f"--mesh has no {key!r}{nearest(key, KEYS) or ': it takes ' + ', '.join(KEYS)}")
        if key in degrees or not value.isdecimal() or int(value) < 1:
            raise OneblockError(f"--mesh {text!r}: give each of {', '.join(KEYS)} once, as a whole number from 1")
        degrees[key] = int(value)
    mesh = Mesh(**(degrees or {"dp": ranks}))
    if mesh.size != ranks:
        raise OneblockError(
            f"--mesh {mesh} needs {mesh.size} ranks, and {ranks} were started; use "
            f"torchrun --nproc-per-node {mesh.size}, or another --mesh"
        )
    return mesh
