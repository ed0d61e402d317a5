"""`report.md` and what it is read off."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oneblock.cli import main
from oneblock.train.options import Loop, Optimizer, Train
from oneblock.train.report import changed_settings, fenced, table
from oneblock.train.run import Log, results

FLAGS = ["--dim", "16", "--n-layers", "1", "--n-heads", "2", "--context", "24", "--batch-size", "4"]
FLAGS += ["--dtype", "float32"]
FLAGS += ["--warmup", "3", "--log-every", "1", "--steps", "12", "--sample-tokens", "8", "--prompt", "7 times"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(400)))
    return path


def test_a_report_says_what_was_trained_and_what_came_out(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(run), *FLAGS, "--eval-every", "6", "--ema", "0.9"]) == 0
    said, log = (run / "report.md").read_text(), Log(run, 12)
    found = results(log.rows)
    assert found.val is not None and found.val_ema is not None and found.best is not None
    for words in (
        f"**{found.val:.4f}** nats per token",
        f"{found.best:.4f} at step {found.best_step}",
        f"| {found.val_ema:.4f} |",
        f"`{text}`",
        "1,152 (",
        "tokens per second (median)",
        "measured for float32 matmuls",
        "expected",
        "| `dim` | `16` |",
        "| `ema` | `0.9` |",
        "`tensorboard --logdir",
        "## Sample",
    ):
        assert words in said, words
    assert re.search(r"```\n7 times.*```", said, re.DOTALL)
    assert "`lr`" not in said and "`data`" not in said  # a default, and what is said above
    for name in re.findall(r"\]\(([^)]+)\)", said):
        assert (run / name).exists(), name


def test_a_stopped_run_says_how_to_go_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oneblock.train import trainer as session

    class Stopped(session.Trainer):
        def observe(self, state: session.State, metrics: session.Metrics) -> None:
            super().observe(state, metrics)
            state.stop = state.step == 5

    monkeypatch.setattr(session, "Trainer", Stopped)
    run = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(run), *FLAGS]) == 130
    said = (run / "report.md").read_text()
    assert f"Stopped at step 5; continue with `oneblock train --resume {run}`" in said
    assert "## Sample" not in said


def test_results_of_nothing() -> None:
    found = results([])
    assert (found.steps, found.tokens, found.seconds) == (0, 0, 0)
    assert found.loss is found.val is found.best is found.speed is found.mfu is found.memory is None


def test_results_are_read_off_the_rows() -> None:
    rows = [{"step": n, "loss": 3.0, "tokens": 10 * n, "seconds": n / 2, "speed": n, "memory": n} for n in (1, 2, 9)]
    rows += [{"step": 2, "val": 1.5}, {"step": 9, "val": 2.0}]
    found = results(rows)
    assert (found.steps, found.tokens, found.seconds) == (9, 90, 4.5)
    assert (found.val, found.best, found.best_step) == (2.0, 1.5, 2)
    assert (found.loss, found.speed, found.memory, found.mfu) == (3.0, 2, 9, None)


def test_what_is_no_number_is_left_out_of_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.add({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "lr": 0.1}\n'


def test_only_settings_that_were_changed() -> None:
    assert changed_settings(Train()) == {}
    options = Train(model="gpt2", data=(Path("a"),), loop=Loop(batch_size=3), optimizer=Optimizer(optimizer="muon"))
    assert changed_settings(options) == {"model": "gpt2", "batch_size": 3, "optimizer": "muon"}


def test_markdown_that_the_content_cannot_break() -> None:
    assert list(table("none", [])) == []
    assert "| a | x &#124; y |" in list(table("one", [("a", "x | y")]))
    assert fenced("a\n```\nb").startswith("````\n")
