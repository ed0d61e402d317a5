"""Processes that torchrun started, joined and left together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from oneblock.errors import OneblockError

PATIENCE = timedelta(seconds=60)  # that a rank waits for the others before it gives up


@dataclass(frozen=True)
class Ranks:
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1


def started() -> int:
    """How many ranks torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun has started, or this process alone. What a lost rank does to the others is one line.

    After a failure the groups stay: to take one apart with sums under way can hang, since it waits for gloo's threads
    with Python's lock in hand, and they want that lock to be done with a sum. So a rank that failed must end without
    Python's own end, which takes everything apart (cli.end).
    """
    if started() == 1:
        yield Ranks()
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size)
        leave(store, rank, size)
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as e:
        if isinstance(e, OneblockError):
            raise
        raise OneblockError(f"rank {rank} of {size} lost the others or failed: {str(e).strip().splitlines()[0]}") from e


def leave(store: Any, rank: int, size: int) -> None:
    """Until all are through, and rank 0, which may hold the store, last: gloo ends a process whose peer has gone."""
    if store.add("oneblock/through", 1) == size:
        store.set("oneblock/all", "1")
    store.wait(["oneblock/all"])
    if store.add("oneblock/seen", 1) == size:
        store.set("oneblock/over", "1")
    if rank == 0:
        store.wait(["oneblock/over"])
