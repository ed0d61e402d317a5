"""Processes started by torchrun: joining them into one process group and leaving it together."""

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

STORE_TIMEOUT = timedelta(seconds=300)  # for ranks to start and to end: one may import or write for long
COLLECTIVE_TIMEOUT = timedelta(seconds=60)  # for a collective: one rank waits no longer for another


@dataclass(frozen=True)
class ProcessGroup:
    """This process's rank, the number of ranks, and their torch group (None: the default group)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


def torchrun_world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def init_process_group(device: str) -> Iterator[ProcessGroup]:
    """Join the ranks that torchrun started, or yield this process alone; a lost rank raises a OneblockError.

    After a failure the process group is not destroyed: destroying it during a collective can deadlock, since it waits
    for gloo's threads with the GIL held, and they need the GIL to finish. So a failed rank must skip Python's own
    teardown (cli.end).
    """
    if torchrun_world_size() == 1:
        yield ProcessGroup()
        return
    try:
        store, ranks = _connect(device)
        yield ranks
        _store_barrier(store, "exit", ranks)
        dist.destroy_process_group()
    except RuntimeError as e:
        if not _is_connection_failure(e):
            raise
        rank = os.environ.get("RANK", "?")
        reason = str(e).strip().splitlines()[0]
        raise OneblockError(
            f"rank {rank} of {torchrun_world_size()} lost the connection to the other ranks: {reason}"
        ) from e


def _connect(device: str) -> tuple[Any, ProcessGroup]:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(rendezvous("env://", timeout=STORE_TIMEOUT))
    ranks = ProcessGroup(rank, size)
    _store_barrier(store, "start", ranks)  # gloo's own timeout is the shorter one of collectives
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    _store_barrier(store, "ready", ranks)  # a rank that fails from here on does not break the others' start
    return store, ranks


def _store_barrier(store: Any, name: str, ranks: ProcessGroup) -> None:
    """Wait until all ranks arrive. Rank 0, which may host the store, returns last."""
    for step, waits in (("arrived", True), ("left", ranks.rank == 0)):
        key = f"oneblock/{name}/{step}"
        if store.add(key, 1) == ranks.size:
            store.set(f"{key}/all", "1")
        if waits:
            store.wait([f"{key}/all"], STORE_TIMEOUT)


def _is_connection_failure(e: RuntimeError) -> bool:
    """Whether a collective or the store failed. gloo raises plain RuntimeErrors that name its source file."""
    return isinstance(e, dist.DistError) or any(text in str(e) for text in ("/gloo/", "timeout caused pair closure"))
