from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oneblock.cli import main
from oneblock.demo import SIZE, ThreadChoice, corpus, settings
from oneblock.infer.llm import load
from oneblock.train.build import build_state
from oneblock.train.prepare import prepare
from oneblock.train.progress import ProgressDisplay
from oneblock.train.run import new_folder
from oneblock.train.trainer import Trainer


def test_the_text_is_the_same_every_time() -> None:
    text = corpus()
    assert text == corpus()
    assert SIZE / 4 < len(text) <= SIZE
    assert "def " in text


def test_it_trains_shows_and_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--seconds", "15"]) == 0
    torch.set_num_threads(before)
    out, run = capsys.readouterr().out, tmp_path / "runs" / "demo"
    assert "a sample:" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [row["val"] for row in rows if "val" in row]
    assert max(row["step"] for row in rows if "val" in row) == max(row["step"] for row in rows)
    assert f"**{validation[-1]:.4f}**" in (run / "report.md").read_text(), "the report has the last validation"
    assert (run / "loss.png").stat().st_size > 10_000
    assert load(run / "latest").tokenizer is not None
    capsys.readouterr()
    commands = re.findall(r"^  \S*oneblock (.+?)(?:   .*)?$", out, re.MULTILINE)
    assert [line.split()[0] for line in commands] == ["chat", "compare", "train"]
    assert main(commands[1].split()) == 0
    assert "Parameters" in capsys.readouterr().out
    for line in (commands[0], commands[2].replace("FILE.txt", str(next(run.glob("python-*.txt"))))):
        assert main([*line.split(), "--help"]) == 0


def test_its_settings_learn(tmp_path: Path) -> None:
    """Forty steps of the demonstration's own settings: far below the loss of a uniform guess, log(1024) = 6.93."""
    text = tmp_path / "text.txt"
    text.write_text(corpus()[:400_000], encoding="utf-8")
    options = settings(text, seed=0)
    options = replace(options, loop=replace(options.loop, steps=40), out=tmp_path / "run")
    losses: list[float] = []
    job = prepare(options)
    trainer = Trainer(job, options, new_folder(options.out), build_state(job, options), ProgressDisplay(options.loop))
    assert trainer.go(lambda state, metrics: losses.append(float(metrics.loss)))
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < math.log(1024) - 1.5


def test_the_faster_number_of_threads_is_kept() -> None:
    threads = ThreadChoice()
    threads.set = lambda n: None
    threads.step_seconds, threads.tried, threads.now = {2: 0.0, 1: 0.0}, {2: 0.0, 1: 0.0}, 2
    now, used = 0.0, []
    for step in range(400):
        busy = step >= 200
        took = {2: 0.5 if busy else 0.05, 1: 0.08}[threads.now]
        now += took
        threads.record(now, took)
        used.append(threads.now)
    assert used[:200].count(2) > 180
    assert used[200:].count(1) > 180


def test_too_little_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seconds", "3", "--out", str(tmp_path / "run")]) == 2
    assert "at least 15" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
