"""`oneblock runs`: the list, the comparison, and what cannot be compared."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from oneblock.cli import main
from oneblock.train.options import Loop, Optimizer, Train
from oneblock.train.run import Log, record


def make(folder: Path, options: Train, final: float, speed: float = 1000.0) -> Path:
    """A run's folder as a run of 20 steps leaves it."""
    folder.mkdir(parents=True)
    record(folder, options)
    log = Log(folder)
    for n in range(1, 21):
        row = {"step": n, "loss": final + 1 / n, "tokens": 100 * n, "seconds": 100 * n / speed, "speed": speed}
        log.add({**row, "mfu": 0.25, "memory": 5e8})
        if n % 10 == 0:
            log.add({"step": n, "val": final + 1 / n, "tokens": 100 * n, "seconds": 100 * n / speed})
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    options = Train(data=(tmp_path / "a.txt",), loop=Loop(steps=20))
    one = make(tmp_path / "runs" / "one", options, 2.0)
    other = make(tmp_path / "runs" / "two", replace(options, optimizer=Optimizer(lr=3e-3)), 1.5, 4000)
    return [str(one), str(other)]


def error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_compare_prints_and_draws(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.png"
    assert main(["runs", "compare", *two, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line.split() for line in said.splitlines() if line.strip()}
    assert lines["tokens"][-2:] == ["2,000", "2,000"]
    assert lines["validation loss"][-2:] == ["2.0500", "1.5500"]
    assert lines["tokens/s"][-2:] == ["1,000", "4,000"]
    assert lines["MFU"][-2:] == ["25.0%", "25.0%"]
    assert lines["lr"][-2:] == ["0.001", "0.003"]
    assert "steps" in lines and "batch" not in lines  # what is the same is no setting that differs
    assert f"plot written to {out}" in said
    with Image.open(out) as picture:
        colours = {pixel for _, pixel in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x25, 0x63, 0xEB), (0xEA, 0x58, 0x0C)} <= colours  # a curve for each


@pytest.mark.parametrize("x", ["tokens", "time", "steps"])
def test_json(x: str, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "compare", *two, "--json", "--x", x, "--out", str(tmp_path / "c.png")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["settings"] for row in rows] == [{"lr": 1e-3}, {"lr": 3e-3}]
    assert [row["val"] for row in rows] == pytest.approx([2.05, 1.55])
    assert [row["best_step"] for row in rows] == [20, 20]


def test_runs_of_the_same_name_are_told_apart(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make(tmp_path / "more" / "one", Train(), 3.0)
    assert main(["runs", "compare", two[0], str(other), two[0], "--out", str(tmp_path / "c.png")]) == 0
    said = capsys.readouterr().out
    assert "runs/one" in said and "more/one" in said and "runs/one (3)" in said


def test_list(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = tmp_path / "runs" / "begun"  # and killed at once
    begun.mkdir()
    record(begun, Train())
    (tmp_path / "runs" / "notes").mkdir()
    assert main(["runs", "list", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert [name in said for name in ("one", "two", "begun", "notes")] == [True, True, True, False]
    assert "2.0500" in said and "25.0%" in said
    assert main(["runs", "list", str(tmp_path / "runs"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_what_cannot_be(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "runs")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "at least two runs" in error(["runs", "compare", two[0]], capsys)
    assert f"{empty} is not a run: it has no config.toml" in error(["runs", "compare", two[0], str(empty)], capsys)
    assert "is not a run" in error(["runs", "compare", two[0], "nowhere"], capsys)
    record(empty, Train())
    assert "has no losses in its metrics.jsonl yet" in error(["runs", "compare", two[0], str(empty)], capsys)
    assert "runs is not a folder" in error(["runs", "list"], capsys)
    assert "no runs in" in error(["runs", "list", two[0]], capsys)
    assert "takes one folder" in error(["runs", "list", *two], capsys)
    assert "did you mean compare?" in error(["runs", "compar"], capsys)
    assert "could not be written" in error(["runs", "compare", *two, "--out", f"{two[0]}/config.toml/x.png"], capsys)


def test_the_list_needs_no_torch(two: list[str], tmp_path: Path) -> None:
    code = f"from oneblock.cli import main; import sys; main(['runs', 'list', {str(tmp_path / 'runs')!r}])"
    code += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
