"""Start one process per rank, as torchrun does, and collect their output."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 900  # seconds; generous, for machines that run many tests at once


@dataclass(frozen=True)
class RankOutput:
    status: int
    out: str
    err: str


def start_ranks(argv: list[str], ranks: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start the ranks; each writes to `folder/rank-N.out` and `folder/rank-N.err`."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        env = {**os.environ, **shared, "RANK": str(rank)}
        out, err = (folder / f"rank-{rank}.{name}" for name in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            processes.append(subprocess.Popen(argv, env=env, stdout=stdout, stderr=stderr))
    return processes


def wait_ranks(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float = TIMEOUT) -> list[RankOutput]:
    """Wait for all ranks; all are killed if one takes longer than `timeout` seconds."""
    try:
        statuses = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [[(folder / f"rank-{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(len(statuses))]
    return [RankOutput(status, *text) for status, text in zip(statuses, texts, strict=True)]


def run_ranks(argv: list[str], ranks: int, folder: Path) -> list[RankOutput]:
    return wait_ranks(start_ranks(argv, ranks, folder), folder)
