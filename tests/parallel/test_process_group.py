"""Ranks join, fail and leave: who reports a failure, and with which words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launch import RankOutput, run_ranks

SCRIPT = """
import os, sys, time, traceback
from datetime import timedelta
import torch, torch.distributed as dist
from oneblock.parallel import process_group

process_group.COLLECTIVE_TIMEOUT = timedelta(seconds={timeout})
rank = int(os.environ["RANK"])
try:
    {before}
    with process_group.init_process_group("cpu") as ranks:
        {body}
        dist.all_reduce(torch.ones(1))
        print("done")
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # as cli.end does
"""


def run_script(folder: Path, before: str = "pass", body: str = "pass", timeout: int = 60) -> list[RankOutput]:
    script = SCRIPT.format(before=before, body=body, timeout=timeout)
    return run_ranks([sys.executable, "-c", script], 2, folder)


def test_only_connection_failures_are_reported_as_lost_ranks(tmp_path: Path) -> None:
    first, second = run_script(tmp_path, body="rank == 1 and torch.ones(2) @ torch.ones(3)")
    assert first.status == second.status == 1
    assert "OneblockError: rank 0 of 2 lost the connection to the other ranks" in first.err
    assert "RuntimeError: inconsistent tensor size" in second.err
    assert "lost the connection" not in second.err


def test_ranks_may_start_later_than_a_collective_may_take(tmp_path: Path) -> None:
    for rank in run_script(tmp_path, before="time.sleep(8 * rank)", timeout=4):
        assert rank.status == 0, rank.err
        assert "done" in rank.out


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_at_once_does_not_break_the_start_of_the_other(failing: int, tmp_path: Path) -> None:
    """Every rank reports its own error, even if the other one has already ended."""
    body = f"rank == {1 - failing} and time.sleep(3); raise ValueError(f'own error of rank {{rank}}')"
    for rank, output in enumerate(run_script(tmp_path, body=body)):
        assert output.status == 1
        assert f"own error of rank {rank}" in output.err
