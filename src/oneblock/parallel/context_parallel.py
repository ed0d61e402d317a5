"""Context parallelism: split sequences, all-gathered keys and values (arXiv:2407.21783, section 3.3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oneblock.model import Decoder
from oneblock.parallel.collectives import all_gather


class ContextParallelDecoder(Decoder):
    """A decoder with another one's modules whose sequences are split over the ranks of a cp group.

    Each rank passes its tokens with their positions; without positions it runs whole sequences, alone.
    """

    def __init__(self, decoder: Decoder, group: dist.ProcessGroup):
        self.__dict__.update(decoder.__dict__)
        self.group = group

    def hidden_states(self, ids: Tensor, *, positions: Tensor | None = None, **options: Any) -> Tensor:
        if positions is not None and options.get("cache") is None:
            options["cache"] = AllGatherKV(self.group)
        return super().hidden_states(ids, positions=positions, **options)


class AllGatherKV:
    """Keys and values of whole sequences, all-gathered from the ranks that hold their parts: a cache of one pass."""

    length, padded = 0, False

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.positions = group, torch.empty(0)

    def begin(self, positions: Tensor) -> None:
        self.positions = all_gather(positions, self.group, 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return all_gather(k, self.group, 2), all_gather(v, self.group, 2)

    def key_positions(self, layer: int) -> Tensor:
        return self.positions

    def begin_image(self, image: Tensor | None) -> None:
        pass

    def update_image(self, layer: int, k: Tensor, v: Tensor) -> None:
        pass

    def image_kv(self, layer: int) -> None:
        return None

    def end(self) -> None:
        pass
