"""Checkpoints: what is saved comes back to the last bit, and what was damaged is found and named."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oneblock.cli import main
from oneblock.data.packed import PackedDataset
from oneblock.errors import OneblockError
from oneblock.infer.llm import load
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import Decoder, init_weights
from oneblock.spec import get_spec
from oneblock.store import manifest
from oneblock.store.load import load_model
from oneblock.text.train import byte_level
from oneblock.train import checkpoint
from oneblock.train.checkpoint import Saver, list_checkpoints, newest, restore
from oneblock.train.loop import State, start, train
from oneblock.train.options import Loop, Optimizer, Schedule
from oneblock.train.task import Task, next_token_loss

TEXT = np.tile(np.arange(200, dtype=np.uint16), 20)
LOOP = Loop(steps=3, batch_size=2, dtype="float32")


def begin(optimizer: Optimizer, seed: int = 0, family: str = "llama") -> State:
    model = Decoder(get_spec(family, vocab=256, dim=16, n_layers=2, n_heads=2, context=16))
    init_weights(model, seed)
    return start(model, optimizer)


def go(state: State, optimizer: Optimizer, steps: int) -> None:
    loop = Loop(steps=steps, batch_size=2, dtype="float32")
    state.task = Task(PackedDataset(TEXT, 16, 2, 0).batch, next_token_loss)
    train(state, loop, optimizer, Schedule(warmup=2, schedule="wsd", decay=0.0))


def keep(run: Path, state: State, copies: int = 2, background: bool = False) -> Path:
    saver = Saver(run, byte_level(), "text", copies, background)
    folder = saver.save(state)
    saver.wait()
    return folder


def tensors(state: State) -> dict[str, torch.Tensor]:
    named = dict(state.model.named_parameters())
    found = {name: p.detach() for name, p in named.items()}
    return found | {f"{key}.{n}": x for n, p in named.items() for key, x in checkpoint.optimizer_tensors(state, n, p)}


KINDS = {
    "adamw": Optimizer(ema=0.9),
    "muon": Optimizer("muon", matrix_lr=0.01),
    "adamw8bit": Optimizer("adamw8bit"),
}


COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at the first compilation


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon", pytest.param("adamw8bit", marks=[pytest.mark.slow, COMPILES])])
def test_restored_is_saved_and_goes_on_the_same(kind: str, background: bool, tmp_path: Path) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
    options = KINDS[kind]
    one, two = begin(options), begin(options, seed=1)
    go(one, options, 3)
    at = restore(keep(tmp_path, one, background=background), two)
    assert (at.step, at.tokens, at.data) == (3, 3 * 2 * 16, "text")
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    assert len(a) > len(list(one.model.parameters()))
    assert all(torch.equal(a[key], b[key]) for key in a)
    go(one, options, 6)
    go(two, options, 6)
    a, b = tensors(one), tensors(two)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_a_checkpoint_is_a_model_that_everybody_loads(family: str, tmp_path: Path) -> None:
    state = begin(Optimizer(), family=family)
    folder = keep(tmp_path, state)
    ids = torch.arange(12)[None]
    loaded = load_model(folder).model
    for model in (state.model, loaded):
        use_fast_kernels(model)
    with torch.no_grad():
        ours = state.model(ids)
        assert torch.equal(loaded(ids), ours)
        assert torch.equal(load(folder).model(ids), ours)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_a_copy_is_saved_not_what_training_makes_of_it(tmp_path: Path) -> None:
    state = begin(Optimizer())
    go(state, Optimizer(), 2)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    saver = Saver(tmp_path, byte_level(), "text", 2, background=True)
    folder = saver.save(state)
    with torch.no_grad():
        for p in state.model.parameters():
            p.zero_()
    saver.wait()
    found = load(folder).model
    assert all(torch.equal(p, before[name]) for name, p in found.named_parameters())


def test_the_newest_stay(tmp_path: Path) -> None:
    state, saver = begin(Optimizer()), Saver(tmp_path, byte_level(), "text", 2)
    for state.step in (1, 2, 3, 10):
        saver.save(state)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010", "step-000003"]
    assert (tmp_path / "latest").resolve() == newest(tmp_path) == tmp_path / "step-000010"
    state.step = 10
    saver.save(state)  # once more in the same place
    assert newest(tmp_path).name == "step-000010"


def test_an_error_in_the_background_is_told_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in its place")
    saver = Saver(tmp_path / "run", byte_level(), "text", 2, background=True)
    saver.save(begin(Optimizer()))
    with pytest.raises(OneblockError, match="could not be written"):
        saver.wait()
    saver.wait()


# ------------------------------------------------------------------ damage


def damage(path: Path, random: random.Random, cut: bool) -> None:
    content = bytearray(path.read_bytes())
    at = random.randrange(len(content))
    if cut:
        content = content[:at]
    else:
        content[at] ^= 1 << random.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("cut", [False, True], ids=["flipped", "cut"])
def test_every_damaged_file_is_found_and_named(cut: bool, tmp_path: Path) -> None:
    folder = keep(tmp_path, begin(Optimizer()))
    draw = random.Random(0)
    files = sorted(path for path in folder.iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "manifest.json", "training.json"} <= {p.name for p in files}
    for i in range(40):
        path = files[i % len(files)]
        before = path.read_bytes()
        damage(path, draw, cut)
        with pytest.raises(OneblockError, match=path.name):
            manifest.verify(folder)
        path.write_bytes(before)
    manifest.verify(folder)


def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    state, saver = begin(Optimizer()), Saver(tmp_path, byte_level(), "text", 3)
    for state.step in (1, 2, 3):
        saver.save(state)
    damage(tmp_path / "step-000003" / "model.safetensors", random.Random(1), cut=False)
    (tmp_path / "step-000002" / "optimizer.safetensors").unlink()
    told: list[str] = []
    assert newest(tmp_path, told.append).name == "step-000001"
    assert len(told) == 2
    assert "step-000003/model.safetensors is damaged" in told[0]
    assert "step-000002/optimizer.safetensors is missing" in told[1]
    (tmp_path / "step-000001" / "manifest.json").write_text("{}")
    with pytest.raises(OneblockError, match=r"no undamaged checkpoint.*model.safetensors.*manifest.json"):
        newest(tmp_path)


def test_what_was_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    keep(tmp_path, begin(Optimizer()))
    (tmp_path / ".step-000007.new").mkdir()
    shutil.copytree(tmp_path / "step-000000", tmp_path / "step-000009")
    (tmp_path / "step-000009" / "manifest.json").unlink()
    (tmp_path / "latest").unlink()  # killed before the link moved
    assert newest(tmp_path).name == "step-000000"
    with pytest.raises(OneblockError, match="has no checkpoint"):
        newest(tmp_path / "step-000000")
    with pytest.raises(OneblockError, match="no such run"):
        newest(tmp_path / "nothing")


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    state = begin(Optimizer())
    go(state, Optimizer(), 1)
    folder = keep(tmp_path, state)
    with pytest.raises(OneblockError, match=r"no momentum_buffer.*another model, optimizer or task"):
        restore(folder, begin(KINDS["muon"]))


# ------------------------------------------------------------------ kills

TINY = ["--dim", "16", "--n-layers", "1", "--n-heads", "2", "--context", "16", "--batch-size", "2"]
TINY += ["--dtype", "float32"]
RUN = [*TINY, "--steps", "60", "--log-every", "1", "--eval-every", "0", "--save-every", "7", "--warmup", "3"]
RUN += ["--no-tensorboard", "--dropout", "0.1"]


def series(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def killed(argv: list[str], after: float, log: Path) -> None:
    """Run a command and kill it that long after its first line of metrics."""
    with subprocess.Popen([sys.executable, "-m", "oneblock", *argv], stdout=subprocess.DEVNULL) as process:
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.005)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(400)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "--data", str(text), "--out", str(whole), *RUN]) == 0
    draw = random.Random(0)
    killed(
        ["train", "--data", str(text), "--out", str(parts), *RUN], 0.05 + 0.1 * draw.random(), parts / "metrics.jsonl"
    )
    if not list_checkpoints(parts):
        pytest.skip("killed before the first checkpoint")
    killed(["train", "--resume", str(parts)], 0.1 * draw.random(), parts / "metrics.jsonl")
    assert main(["train", "--resume", str(parts)]) == 0
    assert series(parts) == series(whole)
    sums = [manifest.read(run / "latest")["files"]["model.safetensors"] for run in (whole, parts)]
    assert sums[0] == sums[1]


SAVING = """
import sys, itertools
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import Saver, begin, byte_level, Optimizer
state, saver = begin(Optimizer()), Saver(Path(sys.argv[1]), byte_level(), "text", 2)
for state.step in itertools.count(int(sys.argv[2])):
    saver.save(state)
    print(state.step, flush=True)
"""


def test_killed_inside_saving_leaves_a_whole_one(tmp_path: Path) -> None:
    draw, step = random.Random(0), 1
    for _ in range(4):
        code = SAVING.format(here=os.path.dirname(__file__))
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(step)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            step = int(process.stdout.readline())
            time.sleep(0.15 * draw.random())
            process.send_signal(signal.SIGKILL)
            done = [int(line) for line in process.stdout]
        step = max([step, *done])
        found = newest(tmp_path)
        assert int(found.name[5:]) >= step
        step = int(found.name[5:]) + 1
