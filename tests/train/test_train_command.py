"""`oneblock train` from flags to files: runs, resuming, signals, full disks, bad input."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oneblock.cli import main
from oneblock.config import load_toml
from oneblock.errors import OneblockError
from oneblock.infer.llm import load
from oneblock.train.options import Train
from oneblock.train.run import next_folder

TEXT = "".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(400))
TINY = ["--dim", "16", "--n-layers", "2", "--n-heads", "2", "--context", "24", "--batch-size", "4"]
TINY += ["--dtype", "float32"]
QUICK = [*TINY, "--steps", "12", "--log-every", "1", "--eval-every", "4", "--save-every", "5", "--warmup", "3"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sums.txt"
    path.write_text(TEXT)
    return path


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows(run) for key in ("loss", "val") if key in row]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    capsys.readouterr()
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert err.startswith("error: "), out + err
    assert err.count("\n") == 1
    return err


def test_a_run_leaves_a_folder_that_loads(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = ["--sample-every", "6", "--sample-tokens", "8", "--prompt", "7 times"]
    assert main(["train", "--data", str(text), "--out", str(run), *QUICK, *flags]) == 0
    out = capsys.readouterr().out
    assert "12/12  100%" in out
    assert "validation loss" in out
    assert out.count("7 times") == 2
    assert {p.name for p in run.iterdir()} == {
        *("config.toml", "metrics.jsonl", "tensorboard", "loss.png", "curves.png", "report.md"),
        *("latest", "step-000010", "step-000012", ".lock"),
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in losses(run)][-1] == 12
    llm = load(run / "latest")
    assert llm.tokenizer is not None
    assert isinstance(llm.generate("7 times", max_tokens=5).text, str)


@pytest.mark.parametrize("tokenizer", [["bytes"], ["bpe", "--vocab", "300"]])
def test_tokenizers(tokenizer: list[str], text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(run), "--tokenizer", *tokenizer, *QUICK]) == 0
    llm = load(run / "latest")
    assert llm.tokenizer is not None
    assert llm.spec.vocab == llm.tokenizer.vocab_size == (256 if tokenizer == ["bytes"] else 300)
    again = tmp_path / "again"  # its tokenizer and architecture for another run
    folder = str(run / "latest")
    argv = [
        "--tokenizer",
        folder,
        "--model",
        folder + "/config.json",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--context",
        "16",
    ]
    assert main(["train", "--data", str(text), "--out", str(again), *argv]) == 0
    assert load(again / "latest").spec == llm.spec


def test_resumed_is_uninterrupted_to_the_bit(text: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*QUICK, "--dropout", "0.1", "--gradient-accumulation-steps", "2", "--data", str(text)]
    assert main(["train", *flags, "--out", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:  # dies in step 8, three steps after its last checkpoint
        from oneblock.train import loop

        update = loop.TrainStep.update

        def dies(engine: loop.TrainStep, state: loop.State) -> object:
            if state.step == 8:
                raise RuntimeError("power cut")
            return update(engine, state)

        patch.setattr(loop.TrainStep, "update", dies)
        assert main(["train", *flags, "--out", str(parts)]) == 1
    assert losses(parts)[-1][0] == 8
    assert (parts / "latest").resolve().name == "step-000005"
    assert main(["train", "--resume", str(parts)]) == 0
    assert losses(parts) == losses(whole)
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(run / "latest" / file) for run in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_resume_keeps_its_settings_and_can_go_on_longer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(run), *QUICK]) == 0
    assert "a resumed run keeps its settings (--lr differ)" in fails(
        ["train", "--resume", str(run), "--lr", "1"], capsys
    )
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--steps", "14", "--dry-run"]) == 0
    assert re.search(r"from    \S+step-\S+\n(.*\n)+check   it fits", capsys.readouterr().out)
    assert main(["train", "--resume", str(run), "--steps", "14"]) == 0
    assert losses(run)[-1][0] == 14
    text.write_text(TEXT[::-1])
    assert "text has changed" in fails(["train", "--resume", str(run), "--steps", "15"], capsys)


def test_resume_applies_or_refuses_typed_defaults(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typed value that equals the built-in default is still typed, as a flag and in a TOML file."""
    run = tmp_path / "run"
    changes = ["--lr", "0.002", "--ema", "0.9", "--log-every", "3"]
    assert main(["train", "--data", str(text), "--out", str(run), *QUICK, *changes]) == 0
    for flags in (["--lr", "0.001"], ["--ema", "0"], ["--learning-rate=1e-3"]):
        name = "--ema" if "--ema" in flags else "--lr"
        assert f"({name} differ)" in fails(["train", "--resume", str(run), *flags], capsys)
    path = tmp_path / "typed.toml"
    path.write_text("[optimizer]\nlr = 0.001\n")
    assert "(--lr differ)" in fails(["train", "--resume", str(run), "--config", str(path)], capsys)
    assert "(--lr differ)" in fails(["train", "--resume", str(run), "--lr", "0.001", "--steps", "1000"], capsys)
    capsys.readouterr()
    argv = ["train", "--resume", str(run), "--data", os.path.relpath(text), "--lr", "0.002", "--log-every", "10"]
    assert main([*argv, "--steps", "13"]) == 0
    recorded = load_toml(Train, run / "config.toml")
    assert (recorded.watch.log_every, recorded.loop.steps, recorded.optimizer.lr) == (10, 13, 0.002)
    assert main(["train", "--resume", str(run), "--lr", "0.001", "--allow-changes", "--steps", "14"]) == 0
    recorded = load_toml(Train, run / "config.toml")
    assert (recorded.optimizer.lr, recorded.allow_changes) == (0.001, False)


def test_init_starts_from_weights(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "--data", str(text), "--out", str(first), *QUICK, "--steps", "40", "--lr", "1e-2"]) == 0
    folder = str(first / "latest")
    more = tmp_path / "more.txt"
    more.write_text(TEXT.replace("is", "si")[:3000])  # lacks letters that the tokenizer of the weights knows
    flags = ["--steps", "6", "--log-every", "1", "--save-every", "3", "--eval-every", "0", "--dtype", "float32"]
    argv = ["train", "--data", str(more), "--init", folder, "--batch-size", "4", "--warmup", "2", *flags]
    assert main([*argv, "--out", str(second)]) == 0
    a, b = load(folder), load(second / "latest")
    assert a.spec == b.spec
    assert a.tokenizer is not None and b.tokenizer is not None
    assert a.tokenizer.definition() == b.tokenizer.definition()
    random = losses(first)[0][1]
    assert losses(second)[0][1] < random - 0.5
    assert main([*argv, "--out", str(tmp_path / "frozen"), "--lr", "0"]) == 0
    trained, frozen = (load_file(path / "model.safetensors") for path in (first / "latest", tmp_path / "frozen/latest"))
    assert all(torch.equal(trained[name], frozen[name]) for name in trained)
    shutil.rmtree(first)  # resuming needs the run folder alone
    assert main(["train", "--resume", str(second), "--steps", "7"]) == 0
    assert losses(second)[-1][0] == 7


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--model", "{run}/latest"], "--init {run}/latest starts from them"),
        (["--init", "{run}/latest", "--dim", "32"], "own sizes"),
        (["--init", "{run}/latest", "--model", "gpt2"], "leave out --model gpt2"),
        (["--init", "{run}/latest", "--zero-init-residual"], "random weights"),
        (["--init", "{run}/latest", "--context", "4096"], "above the"),
        (["--init", "{run}/none"], "no such folder"),
        (["--init", "{run}/latest", "--prompt", "1" * 99], "--prompt has 99 tokens, but the model's context is 24"),
        (["--init", "{run}/latest", "--tokenizer", "bytes"], "the tokenizer has 256 tokens"),
        (["--init", "{run}/config.toml"], "is a file"),
    ],
)
def test_wrong_weights_are_refused(
    flags: list[str], error: str, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--data", str(text), "--out", str(tmp_path / "new"), *(flag.format(run=run) for flag in flags)]
    assert error.format(run=run) in fails(argv, capsys)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    assert main(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), *QUICK]) == 0
    return folder / "run"


def test_a_prompt_longer_than_the_context_is_refused_at_once(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--data", str(text), *QUICK, "--sample-every", "2", "--prompt", "7 times " * 9]
    assert "--prompt has 72 tokens, but the model's context is 24" in fails(
        [*argv, "--out", str(tmp_path / "a")], capsys
    )


def test_a_text_without_newlines_can_be_sampled(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT.replace("\n", " "))
    assert main(["train", "--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "run"), *QUICK]) == 0


def test_two_processes_cannot_write_one_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = [*TINY, "--data", str(text), "--out", str(run), "--steps", "100000", "--save-every", "3", "--workers", "1"]
    process = started([*flags, "--eval-every", "0"], run)
    wait_for(run / "latest", process)
    assert "another process trains in" in fails(["train", "--resume", str(run)], capsys)
    process.kill()
    process.communicate()
    step = int((run / "latest").resolve().name[5:])
    assert main(["train", "--resume", str(run), "--steps", str(step + 3)]) == 0


def test_new_runs_that_start_together_get_their_own_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert {p.name for p in pool.map(next_folder, [tmp_path] * 8)} == {str(n) for n in range(1, 9)}


def started(flags: list[str], run: Path, **options: Any) -> subprocess.Popen[str]:
    """A training process that has logged its first steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "oneblock", "train", *flags],
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
    wait_for(run / "metrics.jsonl", process)
    return process


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or (path.is_file() and path.read_text().count("\n") <= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_a_closed_terminal_saves(text: Path, tmp_path: Path) -> None:
    """SIGHUP, which the kernel sends when the terminal goes; what is written to it afterwards fails."""
    run = tmp_path / "run"
    flags = [*TINY, "--data", str(text), "--out", str(run), "--steps", "100000", "--save-every", "0"]
    ours, theirs = pty.openpty()
    process = started(
        [*flags, "--eval-every", "0", "--log-every", "1"],
        run,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    os.close(ours)
    assert process.wait(120) == 130
    assert (run / "latest" / "model.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*TINY, "--data", str(text), "--out", str(run), "--steps", "100000", "--save-every", "0"]
    process = started([*flags, "--eval-every", "0"], run)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err.count("\n") == 1
    assert f"oneblock train --resume {run}" in err
    step = json.loads((run / "latest" / "training.json").read_text())["step"]
    assert main(["train", "--resume", str(run), "--steps", str(step + 3)]) == 0


def test_a_full_disk_leaves_the_old_checkpoint(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(run), *QUICK]) == 0
    before = {p.name: p.read_bytes() for p in (run / "latest").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # larger files fail to be written, as on a full disk
    try:
        error = fails(["train", "--resume", str(run), "--steps", "16", "--eval-every", "0"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in error
    assert (run / "latest").resolve().name == "step-000012"
    assert {p.name: p.read_bytes() for p in (run / "latest").iterdir()} == before
    assert [path.name for path in run.glob(".*")] == [".lock"]
    assert main(["train", "--resume", str(run), "--steps", "13"]) == 0


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--context", "500"], "validation text has"),
        (["--context", "900", "--val-share", "0.5"], "fewer than one sequence"),
        (["--model", "lama"], "llama"),
        (["--tokenizer", "char"], "did you mean chars?"),
        (["--tokenizer", "bpe", "--vocab", "100"], "vocab_size is 100"),
        (["--device", "gpu"], "--device"),
        (["--n-heads", "3"], "heads"),
        (["--val", "none.txt"], "cannot read none.txt"),
        (["--data", "none.txt"], "cannot read none.txt"),
        (["--resume", "nowhere"], "no such run"),
    ],
)
def test_bad_settings(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.txt"
    path.write_text(TEXT[:1500])
    assert said in fails(["train", "--data", str(path), "--out", str(tmp_path / "run"), *TINY, *flags], capsys)
    assert not (tmp_path / "run").exists()


OUT_OF_RANGE = """
--max-grad-norm -1, --ema 2, --ema 1, --weight-decay -0.1, --z-loss -1, --router-z-loss -1, --min-lr-ratio 5, --decay
2, --keep -1, --keep 0, --lr nan, --lr -1, --lr inf, --beta2 1, --beta1 -0.1, --momentum 1, --eps 0, --seconds 0,
--workers -1, --seed -1, --seed 99999999999999999999, --steps 0, --val-share 1.5, --dropout 1, --attn-dropout -1,
--batch-size 0, --gradient-accumulation-steps 0, --batch-size-warmup-steps -1, --warmup -1, --context 0, --dim 0,
--load-balancing-weight -1, --log-every -1, --eval-batches -1, --sample-tokens 0, --embed-std -1, --matrix-lr nan,
--weights -1, --vocab 0
"""


@pytest.mark.parametrize("flag", [flag.strip() for flag in OUT_OF_RANGE.split(",")])
def test_numbers_out_of_range_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a flag, in a TOML file and in the dataclass of the Python API."""
    name, value = flag.split()
    error = fails(["train", "--data", "t.txt", name, value], capsys, code=2)
    key = name.removeprefix("--").replace("-", "_")
    assert f"{key} is" in error.replace("-", "_") and "must be" in error
    groups = {f.name: type(getattr(Train(), f.name)) for f in fields(Train) if is_dataclass(getattr(Train(), f.name))}
    group = next((g for g, cls in groups.items() if key in cls.__dataclass_fields__), None)
    number = f"[{value}]" if key == "weights" else value
    path = tmp_path / "run.toml"
    path.write_text(f"{key} = {number}\n" if group is None else f"[{group}]\n{key} = {number}\n")
    assert "must be" in fails(["train", "--config", str(path)], capsys, code=2)
    with pytest.raises(OneblockError, match=key):
        options: dict[str, Any] = {key: (-1.0,) if key == "weights" else float(value)}
        (groups[group] if group else Train)(**options)


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"\x00\x01" * 99, "is not text")])
def test_bad_text(content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    assert said in fails(["train", "--data", str(path)], capsys)
    assert "--data" in fails(["train"], capsys)


def test_a_tokenizer_too_large_for_the_model(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(run), *QUICK]) == 0
    argv = ["train", "--data", str(text), "--model", str(run / "latest" / "config.json"), "--tokenizer", "bytes"]
    assert "the tokenizer has 256 tokens" in fails(argv, capsys)
    assert "own sizes" in fails([*argv, "--dim", "32"], capsys)
    assert "exists" in fails(["train", "--data", str(text), "--out", str(run)], capsys)


def test_a_loss_that_is_no_number_ends_the_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*QUICK, "--lr", "1e30", "--max-grad-norm", "0"]
    argv = ["train", "--data", str(text), "--out", str(tmp_path / "run"), *flags]
    assert "lower --lr" in fails(argv, capsys)


# ------------------------------------------------------------------ settings


def test_dry_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *QUICK, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "12 steps of 4 x 24 tokens = 1,152 tokens" in out
    assert "parameters" in out
    assert "memory" in out
    assert not (tmp_path / "run").exists()


def test_the_recorded_settings_start_the_same_run(text: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", "--data", str(text), "--out", str(one), *QUICK, "--lr", "0.003"]) == 0
    assert main(["train", "--config", str(one / "config.toml"), "--out", str(two)]) == 0
    assert losses(one) == losses(two)
    assert (one / "config.toml").read_text() == (two / "config.toml").read_text()


def test_unknown_key_suggests_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optimizer]\nweight_deca = 0.1\n")
    assert "did you mean weight_decay?" in fails(["train", "--config", str(path)], capsys, code=2)
    assert "did you mean --steps?" in fails(["train", "--step", "3"], capsys, code=2)
