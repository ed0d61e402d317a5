"""What is seen of a run while it goes: measurements, where they go, and steps that were no number."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event, SessionLog

from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.infer.llm import load
from oneblock.train.build import build_state
from oneblock.train.loggers import run_id
from oneblock.train.loop import Metrics, State
from oneblock.train.nonfinite import MAX_NONFINITE_STEPS
from oneblock.train.options import Loop, Optimizer, Schedule, Sizes, Train, Watch
from oneblock.train.preflight import measure_peak
from oneblock.train.prepare import prepare
from oneblock.train.progress import Progress, ProgressDisplay
from oneblock.train.run import record
from oneblock.train.trainer import Trainer, use_ema_weights

RARE = "#"  # stands in a few rows
TEXT = "".join(f"{i} times {i % 7} is {i * (i % 7)}.{RARE if i % 12 == 0 else ''}\n" for i in range(400))


@pytest.fixture
def options(tmp_path: Path) -> Train:
    path = tmp_path / "sums.txt"
    path.write_text(TEXT)
    return Train(
        data=(path,),
        context=24,
        sizes=Sizes(dim=16, n_layers=2, n_heads=2),
        loop=Loop(steps=30, batch_size=4, dtype="float32"),
        optimizer=Optimizer(lr=1e-3),
        schedule=Schedule(warmup=3),
        watch=Watch(log_every=1, eval_every=0, save_every=0, tensorboard=False),
    )


def begin(options: Train, run: Path, **loop: Any) -> Trainer:
    options = replace(options, loop=replace(options.loop, **loop))
    run.mkdir()
    record(run, options)
    job = prepare(options)
    return Trainer(job, options, run, build_state(job, options), ProgressDisplay(options.loop))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(state: State) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


# ------------------------------------------------------------------ measurements


def test_each_look_says_how_fast_and_how_large(options: Train, tmp_path: Path) -> None:
    session = begin(options, tmp_path / "run")
    assert session.go()
    found = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 31))
    for row in found:
        assert row.keys() == {*("step", "loss", "lr", "grad_norm", "tokens", "seconds", "speed", "mfu", "memory")}
        per_token = row["mfu"] / row["speed"] * measure_peak(session.options.loop)
        assert per_token == pytest.approx(6 * 2 * 3_000, rel=1)  # 6 FLOPs a weight of a product, and attention's
        assert 1e8 < row["memory"] < 64e9


def test_experts_are_seen(options: Train, tmp_path: Path) -> None:
    sizes = Sizes(dim=16, n_layers=2, n_heads=2, hidden_dim=16)
    watch = replace(options.watch, tensorboard=True)
    run = tmp_path / "run"
    assert begin(replace(options, model="mixtral", sizes=sizes, watch=watch), run, steps=3).go()
    for row in rows(run / "metrics.jsonl"):
        assert 0 <= row["min_load"] <= row["max_load"] <= 1
        assert row["load_balancing_loss"] >= 0.99
    pictures = [value.image for _, value in events(run) if value.tag == "experts/load"]
    assert len(pictures) == 3
    assert pictures[0].height == 2 * 12  # a row for each layer


def test_a_line_fits_the_terminal() -> None:
    reading = Progress(123_456, 1.0, 12.3456, 1_234_567, 360_000, 1.0, 123.4e9)
    loop = Loop(steps=1_000_000)
    assert len(reading.line(loop)) < 120
    assert len(reading.line(loop, 94)) + 25 < 120  # a bar before it
    assert "100% MFU" in reading.line(loop) and "123 GB" in reading.line(loop)
    narrow = reading.line(loop, 90)
    assert "MFU" in narrow and "GB" not in narrow and len(narrow) <= 90
    assert "left" in reading.line(loop, 20)


# ------------------------------------------------------------------ the averaged weights


def test_averaged_weights_are_validated_and_left_as_a_model(options: Train, tmp_path: Path) -> None:
    watch = replace(options.watch, eval_every=10)
    options = replace(options, optimizer=Optimizer(lr=1e-2, ema=0.9), watch=watch)
    session = begin(options, tmp_path / "run")
    seen: list[dict[str, torch.Tensor]] = []
    assert session.go(lambda state, metrics: seen.append(weights(state)))
    assert all(torch.equal(seen[-1][name], p) for name, p in weights(session.state).items())
    val = [row for row in rows(tmp_path / "run" / "metrics.jsonl") if "val" in row]
    assert [row["step"] for row in val] == [10, 20, 30]
    assert val[-1]["val"] != val[-1]["val_ema"]
    model, mean = load(tmp_path / "run" / "ema"), session.state.ema
    assert mean is not None and model.tokenizer is not None
    for name, p in model.model.named_parameters():
        torch.testing.assert_close(p.float(), mean[name], atol=0, rtol=0)
    with use_ema_weights(session.state):
        assert session.job.val is not None
        assert session.validation_loss(session.job.val) == pytest.approx(val[-1]["val_ema"], abs=1e-6)


# ------------------------------------------------------------------ steps that were no number


class Poison:
    """After the second step one character's vector is infinite: batches with that character give no number."""

    def __init__(self, session: Trainer):
        self.session, self.before, self.seen = session, weights(session.state), list[Metrics]()
        self.token = session.job.tokenizer.encode(RARE)[0]

    @torch.no_grad()
    def __call__(self, state: State, metrics: Metrics) -> None:
        if metrics.step == 2:
            state.model.embed.weight[self.token] = float("inf")
        if not metrics.is_finite:
            after = weights(state)
            assert all(torch.equal(p, after[name]) for name, p in self.before.items())
        self.before = weights(state)
        self.seen.append(metrics)


def first_bad(session: Trainer, token: int) -> int:
    """The first step after the second whose batch has the character in it."""

    data = session.job.rows(session.options.loop)
    return next(n + 1 for n in range(2, 30) if bool((data.batch(n).ids == token).any()))


def test_a_bad_batch_stops_the_run_with_the_weights_before_it(
    options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    session = begin(options, run)
    poison = Poison(session)
    bad = first_bad(session, poison.token)
    with pytest.raises(OneblockError) as caught:
        session.go(poison)
    said = str(caught.value)
    assert said.startswith(f"NaN or Inf in step {bad}: loss nan") and "\n" not in said
    assert f"batch {bad - 1} " in said and "nonfinite.jsonl" in said and "--nonfinite skip" in said
    (row,) = rows(run / "nonfinite.jsonl")
    assert (row["step"], row["batches"], row["loss"]) == (bad, [bad - 1], "nan")
    assert all("loss" in row for row in rows(run / "metrics.jsonl"))
    progress = json.loads((run / "latest" / "training.json").read_text())
    assert (progress["step"], progress["tokens"]) == (bad - 1, (bad - 1) * 4 * 24)
    saved = load(run / "latest").model
    for name, p in saved.named_parameters():
        assert torch.equal(p.float(), poison.before[name])

    # The same batch again, which is told to stop again; then past it
    assert main(["train", "--resume", str(run)]) == 1
    assert f"error: NaN or Inf in step {bad}: loss nan" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--nonfinite", "skip"]) == 0
    out = capsys.readouterr().out
    assert f"NaN or Inf in step {bad}: loss nan" in out and "skipped" in out
    found = rows(run / "nonfinite.jsonl")
    assert [row["step"] for row in found[:3]] == [bad] * 3
    assert (run / "latest").resolve().name == "step-000030"
    losses = [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row]
    assert sorted({*losses, *(row["step"] for row in found)}) == list(range(1, 31))
    assert not set(losses) & {row["step"] for row in found}


def test_skipping_leaves_weights_and_moments_alone(options: Train, tmp_path: Path) -> None:
    session = begin(options, tmp_path / "run", nonfinite="skip")
    poison = Poison(session)
    assert session.go(poison)
    bad = [m.step for m in poison.seen if not m.is_finite]
    assert bad and [row["step"] for row in rows(tmp_path / "run" / "nonfinite.jsonl")] == bad
    moments = load_file(tmp_path / "run" / "latest" / "optimizer.safetensors")
    steps = next(value for key, value in moments.items() if key.startswith("step."))
    assert float(steps) == 30 - len(bad)


def test_without_hope_it_stops_also_when_skipping(
    options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", str(options.data[0])
    flags = [
        "--context",
        "24",
        "--dim",
        "16",
        "--n-layers",
        "1",
        "--n-heads",
        "2",
        "--batch-size",
        "2",
        "--steps",
        "100",
    ]
    flags += ["--lr", "1e30", "--max-grad-norm", "0", "--dtype", "float32", "--eval-every", "0", "--warmup", "0"]
    assert main(["train", "--data", data, "--out", str(run), *flags, "--nonfinite", "skip", "--no-tensorboard"]) == 1
    said = capsys.readouterr().err
    assert f"each of the last {MAX_NONFINITE_STEPS} steps" in said and said.count("\n") == 1
    assert len(rows(run / "nonfinite.jsonl")) == MAX_NONFINITE_STEPS
    assert (run / "loss.png").exists()


def test_on_a_gpu_verdicts_wait_for_a_look(options: Train, tmp_path: Path) -> None:
    """The session is told that its device is another: it then looks with every fifth step alone."""
    watch = replace(options.watch, log_every=5)
    session = begin(replace(options, watch=watch), tmp_path / "run")
    session.device = torch.device("cuda")
    poison = Poison(session)
    bad = first_bad(session, poison.token)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OneblockError, match=f"step {bad}:"):
        patch.setattr("oneblock.train.trainer.peak_memory", lambda device: 0)
        session.go(poison)
    look = -(-bad // 5) * 5
    assert len(poison.seen) == look - 1  # stopped within the look, before this was called
    bads = [row["step"] for row in rows(tmp_path / "run" / "nonfinite.jsonl")]
    assert bads[0] == bad and all(step <= look for step in bads)
    trailing = sum(1 for step in range(look, 0, -1) if set(range(step, look + 1)) <= set(bads))
    assert session.state.step == look - trailing


# ------------------------------------------------------------------ TensorBoard


def events(run: Path) -> Iterator[tuple[Event, Any]]:
    """Every value in the run's event files; the format of records is TFRecord's."""
    for path in sorted((run / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        for event in records(path):
            for value in event.summary.value:
                yield event, value


def records(path: Path) -> Iterator[Event]:
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])  # a checksum before and after
        at += 12 + length + 4


def test_tensorboard_has_what_the_log_has(options: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    watch = replace(options.watch, tensorboard=True, eval_every=5, sample_every=10, sample_tokens=4, prompt="7 times")
    assert begin(replace(options, watch=watch), run, steps=10).go()
    found = {(value.tag, event.step): value for event, value in events(run)}
    for row in rows(run / "metrics.jsonl"):
        for tag, key in (("loss/training", "loss"), ("loss/validation", "val"), ("step/learning_rate", "lr")):
            if key in row:
                assert found[tag, row["step"]].simple_value == pytest.approx(row[key], rel=1e-6)
    assert {tag for tag, _ in found} >= {"machine/mfu", "machine/memory_gb", "machine/tokens_per_second"}
    (text,) = [value for (tag, _), value in found.items() if tag.startswith("sample")]
    assert b"7 times" in text.tensor.string_val[0]


def test_tensorboard_forgets_what_a_killed_run_wrote_too_much(options: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    watch = replace(options.watch, tensorboard=True, save_every=4)
    session = begin(replace(options, watch=watch), run)

    def dies(state: State, metrics: Metrics) -> None:
        if metrics.step == 7:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        session.go(dies)
    assert main(["train", "--resume", str(run), "--steps", "8"]) == 0
    files = sorted((run / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert len(files) == 2
    starts = [event for event in records(files[1]) if event.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(5, SessionLog.START)]
    steps = [event.step for event in records(files[1]) if event.summary.value]
    assert sorted(set(steps)) == [5, 6, 7, 8]


def test_no_tensorboard(options: Train, tmp_path: Path) -> None:
    assert begin(options, tmp_path / "run", steps=2).go()
    assert not (tmp_path / "run" / "tensorboard").exists()


# ------------------------------------------------------------------ trackers

# In place of the packages, which are large: it writes down how it is called. Both were tried by hand as well.
STAND_IN = """
calls = []
def init(**named): calls.append(("init", named))
def log(row, step): calls.append(("log", step, row))
def finish(): calls.append(("finish",))
"""


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_are_called_in_order(
    name: str, options: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    watch = replace(options.watch, track=(name, name), eval_every=2)
    run = tmp_path / "run"
    assert begin(replace(options, watch=watch), run, steps=2).go()
    calls = sys.modules[name].calls
    monkeypatch.delitem(sys.modules, name)
    assert [call[0] for call in calls] == ["init", "log", "log", "log", "finish"]
    named = calls[0][1]
    assert (named["project"], named["name"], named["config"]["lr"]) == ("oneblock", "run", 1e-3)
    json.dumps(named["config"])
    assert named.get("mode") == ("offline" if name == "wandb" else None)
    assert named.get("id") == (run_id(run) if name == "wandb" else None)
    assert [call[1] for call in calls[1:4]] == [1, 2, 2]
    assert np.isfinite(calls[1][2]["loss/training"]) and "loss/validation" in calls[3][2]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed(
    name: str, options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneblock.train.loggers.find_spec", lambda name: None)
    argv = ["train", "--data", str(options.data[0]), "--out", str(tmp_path / "run"), "--track", name]
    assert main(argv) == 1
    assert f"-m pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
