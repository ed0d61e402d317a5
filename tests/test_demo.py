from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from oneblock.cli import main
from oneblock.demo import SIZE, Threads, corpus
from oneblock.infer.llm import load


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
    assert "it writes:" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss"] for row in rows if "loss" in row] or [row["val"] for row in rows]
    assert 0 < found[-1] < 7.2  # how far it comes is a matter of the machine: a busy one takes few steps
    assert (run / "loss.png").stat().st_size > 10_000
    assert load(run / "latest").tokenizer is not None
    capsys.readouterr()
    commands = re.findall(r"^  \S*oneblock (.+?)(?:   .*)?$", out, re.MULTILINE)
    assert [line.split()[0] for line in commands] == ["chat", "compare", "train"]
    assert main(commands[1].split()) == 0
    assert "Parameters" in capsys.readouterr().out
    for line in (commands[0], commands[2].replace("FILE.txt", str(next(run.glob("python-*.txt"))))):
        assert main([*line.split(), "--help"]) == 0


def test_the_faster_number_of_threads_is_kept() -> None:
    threads = Threads()
    threads.set = lambda n: None
    threads.took, threads.tried, threads.now = {2: 0.0, 1: 0.0}, {2: 0.0, 1: 0.0}, 2
    now, used = 0.0, []
    for step in range(400):
        busy = step >= 200
        took = {2: 0.5 if busy else 0.05, 1: 0.08}[threads.now]
        now += took
        threads.after(now, took)
        used.append(threads.now)
    assert used[:200].count(2) > 180
    assert used[200:].count(1) > 180


def test_too_little_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seconds", "3", "--out", str(tmp_path / "run")]) == 1
    assert "at least 15" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
