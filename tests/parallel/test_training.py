"""Training on several ranks is training on one: losses, gradients, weights, checkpoints."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from launch import TIMEOUT, run_ranks, start_ranks
from run_schemes import build_state, full_weights, run, validation_loss

from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.parallel.mesh import Mesh, parse_mesh
from oneblock.parallel.world import World
from oneblock.spec import get_spec
from oneblock.train.checkpoint import newest, restore
from oneblock.train.options import Loop, Optimizer, Train
from oneblock.train.preflight import check_mesh

TWO = [["dp=2", "llama"], ["fsdp=2", "gemma3"], ["tp=2", "llama"], ["cp=2", "gemma3"], ["ep=2", "mixtral"]]
TWO += [["fsdp=2", "mixtral"], ["dp=2", "mixtral"], ["tp=2", "gemma3"], ["tp=2", "gpt2"], ["tp=2", "phi"]]
TWO += [["pp=2", "llama"], ["pp=2", "gpt2"], ["pp=2", "gemma3"], ["cp=2", "mllama"]]
TWO += [["dp=2", "llama+value"], ["fsdp=2", "llama+value"], ["tp=2", "llama+value"], ["cp=2", "llama+value"]]
FOUR = [["dp=4", "gpt2"], ["dp=2 fsdp=2", "llama"], ["dp=2 tp=2", "llama"], ["fsdp=2 tp=2", "llama"]]
FOUR += [["dp=2 cp=2", "llama"], ["dp=2 ep=2", "mixtral"], ["fsdp=2 cp=2", "llama"], ["cp=2 tp=2", "llama"]]
FOUR += [["pp=2 dp=2", "llama"], ["pp=2 dp=2", "gpt2"], ["fsdp=2 tp=2", "llama+value"]]


SCHEMES = pytest.mark.parametrize(("mesh", "family"), TWO + FOUR, ids=lambda x: x)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every scheme, on groups of two and of four processes; return the folder of their results."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks, schemes in ((2, TWO), (4, FOUR)):
        argv = [sys.executable, str(Path(__file__).parent / "run_schemes.py"), str(folder), json.dumps(schemes)]
        for rank in run_ranks(argv, ranks, folder / f"{ranks}-ranks"):
            assert rank.status == 0, rank.err[-3000:]
    return folder


@pytest.fixture(scope="module")
def single_process() -> dict[str, tuple[dict[str, torch.Tensor], list[list[float]], float]]:
    """Weights, metrics and validation loss of each family, trained by one process."""
    results = {}
    for family in {family for _, family in TWO + FOUR}:
        state, rows = run(World(), family)
        results[family] = full_weights(state), rows, validation_loss(World(), state)
    return results


@SCHEMES
def test_parallel_training_equals_one_process(mesh: str, family: str, results: Path, single_process: dict) -> None:
    weights, rows, val = single_process[family]
    out = results / f"{mesh} {family}"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["val"] == pytest.approx(val, abs=1e-5)
    assert torch.tensor(metrics["steps"]).shape == (10, 3)
    torch.testing.assert_close(torch.tensor(metrics["steps"]), torch.tensor(rows), atol=1e-5, rtol=1e-5)
    parallel = load_file(out / "weights.safetensors")
    assert parallel.keys() == weights.keys()
    for name, x in weights.items():
        torch.testing.assert_close(parallel[name], x, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@SCHEMES
def test_one_process_loads_a_parallel_checkpoint(mesh: str, family: str, results: Path) -> None:
    out = results / f"{mesh} {family}"
    state = build_state(World(), family, seed=1)
    assert restore(newest(out), state).step == 10
    saved, weights = load_file(out / "weights.safetensors"), full_weights(state)
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


# ------------------------------------------------------------------ meshes


def test_parse_mesh_and_ranks() -> None:
    assert parse_mesh("dp=8 tp=4, cp=2", 64) == Mesh(dp=8, tp=4, cp=2)
    assert parse_mesh("", 3) == Mesh(dp=3)
    assert parse_mesh("dp=2 pp=4", 8) == Mesh(pp=4, dp=2)
    assert [World(rank, Mesh(pp=2, dp=2)).data_rank for rank in range(4)] == [0, 1, 0, 1]
    assert [World(rank, Mesh(pp=2, dp=2)).is_last_stage for rank in range(4)] == [False, False, True, True]
    assert str(Mesh(dp=8, tp=4)) == "dp=8 tp=4"
    assert World(5, Mesh(pp=4, dp=2)).pipeline_ranks == [1, 3, 5, 7]
    data_ranks = [World(rank, Mesh(dp=2, fsdp=2, tp=2)).data_rank for rank in range(8)]
    assert data_ranks == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("text", "ranks", "message"),
    [
        ("dp=3", 2, "needs 3 ranks, and 2 were started"),
        ("fsdpp=2", 2, "no 'fsdpp': did you mean fsdp"),
        ("dp=2 dp=1", 2, "once"),
        ("dp=two", 2, "whole number"),
        ("dp=0", 2, "whole number"),
    ],
)
def test_malformed_meshes_are_refused(text: str, ranks: int, message: str) -> None:
    with pytest.raises(OneblockError, match=message):
        parse_mesh(text, ranks)


@pytest.mark.parametrize(
    ("mesh", "family", "options", "message"),
    [
        (Mesh(dp=2), "llama", Train(loop=Loop(seconds=9)), "--seconds 9 is for one rank.*use --steps"),
        (
            Mesh(cp=3),
            "llama",
            Train(loop=Loop(batch_size=8)),
            "divisible by 2 x cp = 6; use --context 36",
        ),
        (Mesh(cp=2), "llama", Train(documents=True), "--documents is not supported with cp=2"),
        (Mesh(tp=4), "llama", Train(), "number of KV heads 2 is not divisible by tp=4; use tp=1 or 2"),
        (Mesh(ep=2), "llama", Train(), "this one has no experts"),
        (
            Mesh(ep=3),
            "mixtral",
            Train(loop=Loop(batch_size=9)),
            "experts 4 is not divisible by ep=3; use ep=1, 2 or 4",
        ),
        (Mesh(tp=2), "llama", Train(loop=Loop(fp8=True)), "--fp8 is not supported with tp=2"),
        (Mesh(tp=2), "olmo2", Train(), "QK norms over all heads"),
        (Mesh(tp=2), "mixtral", Train(), "does not support MoE models in training"),
        (Mesh(fsdp=2), "llama", Train(optimizer=Optimizer("muon")), "muon needs unsharded weights, not fsdp=2"),
        (Mesh(pp=2, tp=2), "llama", Train(), "pp=2 is supported with dp alone"),
        (Mesh(pp=3), "llama", Train(), "pp=3 stages need at least as many layers, and the model has 2"),
        (Mesh(pp=2), "mixtral", Train(), "pp does not support MoE"),
    ],
)
def test_unsupported_meshes_are_refused(mesh: Mesh, family: str, options: Train, message: str) -> None:
    sizes = {"vocab": 64, "dim": 32, "n_heads": 4, "context": 32}
    built = get_spec(family, **sizes) if family == "olmo2" else get_spec(family, **sizes, n_kv_heads=2)
    with pytest.raises(OneblockError, match=message):
        check_mesh(built, 32, options, mesh)


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
def test_train_command_on_two_ranks(mesh: str, text: Path, tmp_path: Path) -> None:
    """A run on two ranks, stopped and resumed, equals the run on one."""
    flags = ["--data", str(text), *QUICK, "--save-every", "3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert subprocess.run(command(*flags, "--steps", "8", "--out", str(one)), check=False).returncode == 0
    new_run = [*flags, "--steps", "5", "--mesh", mesh, "--out", str(two)]
    for argv in (new_run, ["--resume", str(two), "--steps", "8"]):
        first, second = run_ranks(command(*argv), 2, tmp_path / "logs")
        assert first.status == second.status == 0, first.err + second.err
        assert not second.out + second.err  # only the first rank prints
    assert "resuming" in first.out
    # the shorter run reaches the end of its schedule sooner: later steps differ
    assert series(two)[:2] == pytest.approx(series(one)[:2], abs=1e-5)
    assert len(series(two)) == 8
    assert main(["generate", str(two / "latest"), "--prompt", "7 times", "--max-tokens", "3"]) == 0


def last_error_after_losing_rank(text: Path, folder: Path) -> str:
    """Kill rank 1 during a run and return the last line that rank 0 prints."""
    folder.mkdir()
    run = folder / "run"
    argv = command("--data", str(text), *QUICK, "--steps", "100000", "--save-every", "0", "--out", str(run))
    first, second = processes = start_ranks(argv, 2, folder)
    try:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert first.poll() is None, (folder / "rank-0.err").read_text()
            time.sleep(0.05)
        second.send_signal(signal.SIGKILL)
        assert first.wait(timeout=TIMEOUT) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return (folder / "rank-0.err").read_text().splitlines()[-1]


LOST = "error: rank 0 of 2 lost the connection to the other ranks"


def test_losing_a_rank_ends_the_run(text: Path, tmp_path: Path) -> None:
    assert last_error_after_losing_rank(text, tmp_path / "once").startswith(LOST)


@pytest.mark.slow
def test_losing_a_rank_always_ends_the_run(text: Path, tmp_path: Path) -> None:
    """Destroying torch's process groups during a collective deadlocked one time in ten."""
    for i in range(60):
        assert last_error_after_losing_rank(text, tmp_path / str(i)).startswith(LOST)


def test_mesh_for_another_number_of_ranks_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(text), *QUICK, "--mesh", "dp=2"]) == 1
    assert "needs 2 ranks, and 1 were started" in capsys.readouterr().err
