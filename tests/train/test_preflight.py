"""What a run will take, and the refusal of one that the machine cannot hold."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.parallel.mesh import Mesh
from oneblock.parallel.world import World
from oneblock.plan import flops, params
from oneblock.spec import get_spec
from oneblock.text.train import byte_level
from oneblock.train import machine, preflight
from oneblock.train.options import Loop, Optimizer, Schedule, Sizes, Train, Watch
from oneblock.train.preflight import (
    check_run,
    estimate,
    estimate_memory,
    find_gpu_by_name,
    find_shortage,
    largest_batch,
    measure_peak,
)
from oneblock.train.prepare import Job, prepare

FLAGS = ["--dim", "32", "--n-layers", "3", "--n-heads", "2", "--context", "32", "--batch-size", "12", "--steps", "2"]
FLAGS += ["--gradient-accumulation-steps", "2", "--dtype", "float32", "--no-tensorboard", "--eval-every", "0"]


@pytest.fixture
def options(tmp_path: Path) -> Train:
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(400)))
    return Train(
        data=(path,),
        context=32,
        sizes=Sizes(dim=32, n_layers=3, n_heads=2),
        loop=Loop(steps=100, batch_size=12, gradient_accumulation_steps=2, dtype="float32"),
        out=tmp_path / "run",
    )


@pytest.fixture
def job(options: Train) -> Job:
    return prepare(options)


def test_the_estimate_is_plans(options: Train, job: Job) -> None:
    found = estimate(job, options)
    per_token, total = flops.train(job.spec, 32), 100 * 2 * 12 * 32
    assert found.run.tokens == total
    assert found.run.flops == per_token * total
    assert found.run.seconds == pytest.approx(per_token * total / (0.4 * measure_peak(options.loop)))
    weights = 4 * params.total(job.spec)
    assert found.checkpoint == 3 * weights  # and AdamW's two moments
    assert found.disk == 3 * found.checkpoint  # two are kept while the next is written
    assert found.memory.total > 4 * weights
    assert found.gpu is None and "n/a" in found.lines(options.loop)
    ramp = replace(options, schedule=Schedule(batch_size_warmup_steps=100))
    assert total / 2 < estimate(job, ramp).run.tokens < total
    average = replace(options, optimizer=Optimizer(ema=0.9))
    assert estimate(job, average).disk == 3 * 4 * weights + weights
    again = replace(options, loop=replace(options.loop, activation_checkpointing="full"))
    assert estimate(job, again).run.flops == pytest.approx(4 / 3 * found.run.flops)
    assert estimate(job, again).memory.total < found.memory.total


def test_time_instead_of_steps(options: Train, job: Job) -> None:
    timed = replace(options, loop=replace(options.loop, seconds=60.0))
    found = estimate(job, timed)
    assert found.steps is None and found.run.seconds == 60
    assert found.run.tokens == pytest.approx(
        60 * 0.4 * measure_peak(options.loop) / flops.train(job.spec, 32), rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpus_by_their_names(name: str, found: str | None) -> None:
    gpu = find_gpu_by_name(name)
    assert (gpu.name if gpu else None) == found


def test_a_known_gpu_has_a_price(options: Train, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_gpu", lambda device: find_gpu_by_name("NVIDIA H100"))
    found = estimate(job, options, World(mesh=Mesh(dp=4)))
    assert found.run.dollars == pytest.approx(found.run.seconds / 3600 * 4 * 2.5)
    assert "4 x H100 at $2.50 an hour" in found.lines(options.loop)


# ------------------------------------------------------------------ refusals


def bytes_of(words: str) -> float:
    number, unit = words.split()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_too_little_memory_is_refused_with_what_fits(options: Train, job: Job) -> None:
    """For many sizes of a machine: what is advised fits, and the next larger batch does not."""
    whole, least = (
        estimate_memory(job, options, 12, "none", World()).total,
        estimate_memory(job, options, 1, "full", World()).total,
    )
    advised = set()
    for have in range(least, whole, (whole - least) // 40):
        said = find_shortage(job, options, replace(estimate(job, options), available=have))
        assert said is not None and "of memory" in said
        for flags, size in re.findall(r"(--[^(]+) fits \(([^)]+)\)", said):
            mode = "full" if "--activation-checkpointing full" in flags else "none"
            batch = re.search(r"--batch-size (\d+) --gradient-accumulation-steps (\d+)", flags)
            rows, times = (int(batch[1]), int(batch[2])) if batch else (12, 2)
            assert rows * times == 24
            assert estimate_memory(job, options, rows, mode, World()).total <= have
            larger = [n for n in range(rows + 1, 13) if 24 % n == 0]
            assert all(estimate_memory(job, options, n, mode, World()).total > have for n in larger)
            assert bytes_of(size) == pytest.approx(
                estimate_memory(job, options, rows, mode, World()).total, rel=0.06, abs=1000
            )
            advised.add(flags.strip())
    assert "--activation-checkpointing full" in advised and len(advised) > 5
    said = find_shortage(job, options, replace(estimate(job, options), available=least - 1))
    assert said is not None and "one sequence with --activation-checkpointing full needs" in said
    assert find_shortage(job, options, replace(estimate(job, options), available=whole)) is None


def test_ranks_share_the_rows(options: Train, job: Job) -> None:
    four = World(mesh=Mesh(dp=4))
    alone, shared = estimate(job, options), estimate(job, options, four)
    alike = estimate_memory(job, options, 3, "none", World())
    assert shared.memory == replace(
        alike, accumulate=True, embedding_grad=shared.memory.embedding_grad
    )  # what gathers them is kept
    parts = World(mesh=Mesh(fsdp=2, tp=2))
    assert (
        estimate_memory(job, options, 12, "none", parts).states
        < 0.4 * estimate_memory(job, options, 12, "none", World()).states
    )
    assert shared.run.seconds == pytest.approx(alone.run.seconds / 4)
    assert "for each device" in shared.lines(options.loop)
    assert largest_batch(job, options, shared.memory.total, "none", four) == 12
    have = shared.memory.total - 1
    assert largest_batch(job, options, have, "none", four) in (4, 8)
    said = find_shortage(job, options, replace(shared, available=have), four)
    assert said is not None and said.startswith("each device needs")


def test_too_little_disk(options: Train, job: Job) -> None:
    found = estimate(job, options)
    assert "lower --keep" in str(find_shortage(job, options, replace(found, free=found.disk - 1)))
    more = estimate(job, replace(options, watch=Watch(keep=5)))
    assert more.disk == 2 * found.disk


def test_numbers_that_disagree(options: Train, job: Job) -> None:
    found = estimate(job, options)
    small = replace(job, tokenizer=byte_level())
    with pytest.raises(OneblockError, match=f"tokenizer has 256 tokens, but llama a vocabulary of {job.spec.vocab}"):
        check_run(small, options, found)
    table = get_spec("gpt2", vocab=job.spec.vocab, dim=32, n_layers=1, n_heads=2, context=24)
    with pytest.raises(OneblockError, match="--context is 32, but llama has a table of 24 positions"):
        check_run(replace(job, spec=table), options, found)
    with pytest.raises(OneblockError, match="--batch-size 12 is not divisible by 5 data-parallel ranks"):
        check_run(job, options, found, World(mesh=Mesh(dp=5)))
    check_run(job, options, found)


def test_the_command_refuses_before_anything_is_written(
    options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", "--data", str(options.data[0]), "--out", str(tmp_path / "run"), *FLAGS]
    assert main([*argv, "--dry-run"]) == 0
    assert "check   it fits" in capsys.readouterr().out
    monkeypatch.setattr(preflight, "total_memory", lambda device: 100_000)  # a machine that has next to nothing
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: it needs about ") and "100 kB are free" in err and err.count("\n") == 1
    assert main([*argv, "--dry-run"]) == 0
    assert "check   it needs about" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--no-preflight"]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3"]) == 0  # as it began


def test_the_peak_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(dtype="float32")
    first = measure_peak(loop)
    monkeypatch.setattr(preflight, "peak_flops", lambda *args: pytest.fail("measured again"))
    assert measure_peak(loop) == first > 1e8


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = machine.total_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.total_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)  # others come and go
