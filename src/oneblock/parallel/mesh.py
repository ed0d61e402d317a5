"""How ranks share the work: `dp=8 tp=4 cp=2`. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from oneblock.config import nearest
from oneblock.errors import OneblockError


@dataclass(frozen=True)
class Mesh:
    """Ranks along each way of sharing; their product is the number of ranks. The last lie nearest to each other."""

    pp: int = 1  # runs of blocks, through which rows pass (arXiv:1811.06965)
    dp: int = 1  # copies of the model, each with its own rows
    ep: int = 1  # rows are shared as by dp, and experts are kept by one rank each
    cp: int = 1  # parts of a row
    fsdp: int = 1  # rows are shared as by dp, and every tensor is kept in parts (ZeRO-3, arXiv:1910.02054)
    tp: int = 1  # parts of every matrix (arXiv:1909.08053)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.dp * self.ep * self.fsdp

    def __str__(self) -> str:
        return (
            " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1) or "dp=1"
        )


KEYS = tuple(f.name for f in fields(Mesh))


def parse_mesh(text: str, ranks: int) -> Mesh:
    """The mesh that a line describes; an empty one gives every rank its own rows. OneblockError with the numbers."""
    found: dict[str, int] = {}
    for part in re.split(r"[\s,]+", text.strip()) if text.strip() else ():
        key, _, value = part.partition("=")
        if key not in KEYS:
            raise OneblockError(f"--mesh has no {key!r}{nearest(key, KEYS) or ': it takes ' + ', '.join(KEYS)}")
        if key in found or not value.isdecimal() or int(value) < 1:
            raise OneblockError(f"--mesh {text!r}: give each of {', '.join(KEYS)} once, as a whole number from 1")
        found[key] = int(value)
    mesh = Mesh(**(found or {"dp": ranks}))
    if mesh.size != ranks:
        raise OneblockError(
            f"--mesh {mesh} is for {mesh.size} ranks, and there are {ranks}: start as many with torchrun"
        )
    return mesh
