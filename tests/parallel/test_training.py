"""Training on several ranks is training on one: losses, gradients, weights, checkpoints."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from ranks import fresh, held_out, run, weights

from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.parallel.mesh import Mesh, parse_mesh
from oneblock.parallel.parallelize import check
from oneblock.parallel.world import World
from oneblock.spec import get_spec
from oneblock.train.checkpoint import newest, restore
from oneblock.train.options import Loop, Optimizer, Train

TWO = [["dp=2", "llama"], ["fsdp=2", "gemma3"], ["tp=2", "llama"], ["cp=2", "gemma3"], ["ep=2", "mixtral"]]
TWO += [["fsdp=2", "mixtral"], ["dp=2", "mixtral"], ["tp=2", "gemma3"], ["tp=2", "gpt2"], ["tp=2", "phi"]]
TWO += [["pp=2", "llama"], ["pp=2", "gpt2"], ["pp=2", "gemma3"]]
FOUR = [["dp=4", "gpt2"], ["dp=2 fsdp=2", "llama"], ["dp=2 tp=2", "llama"], ["fsdp=2 tp=2", "llama"]]
FOUR += [["dp=2 cp=2", "llama"], ["dp=2 ep=2", "mixtral"], ["fsdp=2 cp=2", "llama"], ["cp=2 tp=2", "llama"]]
FOUR += [["pp=2 dp=2", "llama"], ["pp=2 dp=2", "gpt2"]]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(argv: list[str], ranks: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """A process for each rank, with what it says in `log` and its number."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    found = []
    for rank in range(ranks):
        with log.with_name(f"{log.name}{rank}").open("wb") as file:
            env = {**os.environ, **shared, "RANK": str(rank)}
            found.append(subprocess.Popen(argv, env=env, stdout=file, stderr=file))
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scheme, run by groups of two and of four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks, schemes in ((2, TWO), (4, FOUR)):
        argv = [sys.executable, str(Path(__file__).parent / "ranks.py"), str(folder), json.dumps(schemes)]
        log = folder / f"log{ranks}-"
        for rank, process in enumerate(start(argv, ranks, log)):
            assert process.wait(timeout=200) == 0, log.with_name(f"{log.name}{rank}").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[dict[str, torch.Tensor], list[list[float]], float]]:
    found = {}
    for family in {family for _, family in TWO + FOUR}:
        state, metrics = run(World(), family)
        found[family] = weights(state), metrics, held_out(World(), state)
    return found


@pytest.mark.parametrize(("mesh", "family"), TWO + FOUR, ids=lambda x: x)
def test_many_ranks_are_one(mesh: str, family: str, ran: Path, alone: dict) -> None:
    expected, series, val = alone[family]
    out = ran / f"{mesh} {family}"
    metrics = json.loads((out / "metrics.json").read_text())
    found = metrics["steps"]
    assert metrics["val"] == pytest.approx(val, abs=1e-5)
    assert torch.tensor(found).shape == (10, 3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(series), atol=1e-5, rtol=1e-5)
    theirs = load_file(out / "weights.safetensors")
    assert theirs.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(theirs[name], x, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("mesh", "family"), TWO + FOUR, ids=lambda x: x)
def test_what_many_saved_one_can_load(mesh: str, family: str, ran: Path) -> None:
    out = ran / f"{mesh} {family}"
    state = fresh(World(), family, seed=1)
    at = restore(newest(out), state)
    assert at.step == 10
    saved = load_file(out / "weights.safetensors")
    found = weights(state)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


# ------------------------------------------------------------------ meshes


def test_meshes() -> None:
    assert parse_mesh("dp=8 tp=4, cp=2", 64) == Mesh(dp=8, tp=4, cp=2)
    assert parse_mesh("", 3) == Mesh(dp=3)
    assert parse_mesh("dp=2 pp=4", 8) == Mesh(pp=4, dp=2)
    assert [World(rank, Mesh(pp=2, dp=2)).data_rank for rank in range(4)] == [0, 1, 0, 1]
    assert [World(rank, Mesh(pp=2, dp=2)).judges for rank in range(4)] == [False, False, True, True]
    assert str(Mesh(dp=8, tp=4)) == "dp=8 tp=4"
    places = [World(rank, Mesh(dp=2, fsdp=2, tp=2)).data_rank for rank in range(8)]
    assert places == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("text", "ranks", "said"),
    [
        ("dp=3", 2, "is for 3 ranks, and there are 2"),
        ("fsdpp=2", 2, "no 'fsdpp': did you mean fsdp"),
        ("dp=2 dp=1", 2, "once"),
        ("dp=two", 2, "whole number"),
        ("dp=0", 2, "whole number"),
    ],
)
def test_bad_meshes(text: str, ranks: int, said: str) -> None:
    with pytest.raises(OneblockError, match=said):
        parse_mesh(text, ranks)


@pytest.mark.parametrize(
    ("mesh", "family", "options", "said"),
    [
        (Mesh(dp=2), "llama", Train(loop=Loop(seconds=9)), "give --steps"),
        (Mesh(cp=3), "llama", Train(loop=Loop(batch_size=8)), "32 tokens do not divide by 2 x cp = 6"),
        (Mesh(cp=2), "llama", Train(documents=True), "--documents"),
        (Mesh(tp=4), "llama", Train(), "tp = 4 does not divide 4 heads, 2 KV heads"),
        (Mesh(ep=2), "llama", Train(), "has none"),
        (Mesh(ep=3), "mixtral", Train(loop=Loop(batch_size=9)), "experts do not divide by ep = 3"),
        (Mesh(tp=2), "olmo2", Train(), "norms over all heads"),
        (Mesh(tp=2), "mixtral", Train(), "does not split experts"),
        (Mesh(fsdp=2), "llama", Train(optimizer=Optimizer("muon")), "muon needs whole tensors"),
        (Mesh(pp=2, tp=2), "llama", Train(), "pp goes with dp alone"),
        (Mesh(pp=3), "llama", Train(), "pp = 3 stages for 2 layers"),
        (Mesh(pp=2), "mixtral", Train(), "pp does not pass on what experts"),
    ],
)
def test_what_cannot_be_shared(mesh: Mesh, family: str, options: Train, said: str) -> None:
    sizes = {"vocab": 64, "dim": 32, "n_heads": 4, "context": 32}
    built = get_spec(family, **sizes) if family == "olmo2" else get_spec(family, **sizes, n_kv_heads=2)
    with pytest.raises(OneblockError, match=said):
        check(built, 32, options, mesh)


# ------------------------------------------------------------------ the command

TINY = ["--dim", "16", "--n-layers", "2", "--n-heads", "2", "--context", "16", "--batch-size", "4"]
TINY += ["--dtype", "float32"]
QUICK = [*TINY, "--log-every", "1", "--warmup", "2", "--no-tensorboard", "--sample-tokens", "4", "--eval-every", "0"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(400)))
    return path


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "oneblock", "train", *argv]


def series(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("mesh", ["", "fsdp=2", "pp=2"])
def test_the_command_on_two_ranks(mesh: str, text: Path, tmp_path: Path) -> None:
    """A run on two ranks, stopped and resumed, is the run on one."""
    flags = ["--data", str(text), *QUICK, "--save-every", "3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert subprocess.run(command(*flags, "--steps", "8", "--out", str(one)), check=False).returncode == 0
    for argv in ([*flags, "--steps", "5", "--mesh", mesh, "--out", str(two)], ["--resume", str(two), "--steps", "8"]):
        for rank, process in enumerate(start(command(*argv), 2, tmp_path / "log")):
            assert process.wait(timeout=100) == 0, (tmp_path / f"log{rank}").read_text()
    assert "resuming" in (tmp_path / "log0").read_text()
    assert not (tmp_path / "log1").read_text()  # only the first says what all do
    # the shorter run came down its schedule sooner: those steps differ
    assert series(two)[:2] == pytest.approx(series(one)[:2], abs=1e-5)
    assert len(series(two)) == 8
    assert main(["generate", str(two / "latest"), "--prompt", "7 times", "--max-tokens", "3"]) == 0


def lose(text: Path, folder: Path) -> str:
    """What rank 0 says last when the other is killed in the midst of a run."""
    folder.mkdir()
    run = folder / "run"
    argv = command("--data", str(text), *QUICK, "--steps", "100000", "--save-every", "0", "--out", str(run))
    first, second = processes = start(argv, 2, folder / "log")
    try:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert first.poll() is None, (folder / "log0").read_text()
            time.sleep(0.05)
        second.send_signal(signal.SIGKILL)
        assert first.wait(timeout=60) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return (folder / "log0").read_text().splitlines()[-1]


def test_a_lost_rank_ends_the_run(text: Path, tmp_path: Path) -> None:
    assert lose(text, tmp_path / "once").startswith("error: rank 0 of 2 lost the others")


@pytest.mark.slow
def test_lost_ranks_always_end_the_run(text: Path, tmp_path: Path) -> None:
    """Torch's groups, taken apart at the wrong moment, hung one time in ten."""
    for i in range(60):
        assert lose(text, tmp_path / str(i)).startswith("error: rank 0 of 2 lost the others")


def test_a_mesh_for_another_number_of_ranks(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(text), *QUICK, "--mesh", "dp=2"]) == 1
    assert "is for 2 ranks, and there are 1" in capsys.readouterr().err
