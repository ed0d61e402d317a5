"""The part of a batch that one rank runs: its rows, and its tokens of each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from oneblock.data.packed import IGNORE_INDEX, Batch
from oneblock.parallel.world import World


def shard_batch(batch: Batch, world: World) -> Batch:
    """Return this rank's part of a batch of the rows that it reads.

    With cp each rank has two pieces of every row, one from either end, so that all attend to as many keys. With tp
    each rank has all ids and a chunk of the targets. Rows that are not divisible are padded, without targets.
    """
    mesh = world.mesh
    if mesh.cp == mesh.tp == 1:
        return batch if world.is_last_stage else without_targets(batch)
    batch = pad_rows(batch, (2 * mesh.cp if mesh.cp > 1 else 1) * mesh.tp)
    if mesh.cp > 1:
        columns = zigzag_positions(batch.ids.shape[1], world.coordinates["cp"], mesh.cp)
        ids, targets = batch.ids[:, columns], batch.targets[:, columns]
        batch = replace(batch, ids=ids, targets=targets, positions=columns[None])
    targets = batch.targets.chunk(mesh.tp, 1)[world.coordinates["tp"]]
    return replace(batch, targets=targets, count=int((targets != IGNORE_INDEX).sum()))


def deal_batches(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """Deal batches that every rank iterates over: each yields as many parts, the last ones perhaps without targets."""
    batches = iter(batches)
    while dealt := list(islice(batches, world.data_ranks)):
        rank = world.data_rank
        yield shard_batch(dealt[rank] if rank < len(dealt) else without_targets(dealt[0]), world)


def zigzag_positions(length: int, rank: int, ranks: int) -> Tensor:
    """Return the positions of pieces `rank` and `-1 - rank` of 2 x ranks pieces of a row."""
    pieces = torch.arange(length).chunk(2 * ranks)
    return torch.cat((pieces[rank], pieces[-1 - rank]))


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Pad rows at the end to a multiple of that many tokens; earlier tokens do not attend to padding."""
    missing = -batch.ids.shape[1] % multiple
    fills = {"ids": 0, "targets": IGNORE_INDEX, "documents": -1, "positions": 0}
    tensors = {name: x for name in fills if isinstance(x := getattr(batch, name), Tensor)}
    return replace(batch, **{name: F.pad(x, (0, missing), value=fills[name]) for name, x in tensors.items()})


def without_targets(batch: Batch) -> Batch:
    return replace(batch, targets=torch.full_like(batch.targets, IGNORE_INDEX), count=0)
