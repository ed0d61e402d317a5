"""Pictures of runs, and the smooth curve in them."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from PIL import Image

from oneblock.errors import OneblockError
from oneblock.train.plot import draw, draw_all, draw_runs, smooth, time_unit, tokens_unit

ROWS = [
    {
        "step": i,
        "loss": 3 + 5 / i,
        "lr": 1e-3 / i,
        "grad_norm": 1.0,
        "tokens": 96 * i,
        "seconds": 0.1 * i,
        "speed": 960.0,
    }
    | {"mfu": 0.1, "memory": 5e8, "load_balancing_loss": 1.1, "max_load": 0.4, "min_load": 0.1}
    for i in range(1, 60)
] + [{"step": 30, "val": 3.2, "val_ema": 3.3, "tokens": 2880, "seconds": 3.0}]


def test_smoothing_does_not_lag() -> None:
    for n in (0, 1, 2, 4, 5, 30, 100, 999):
        line = [10.0 - 0.1 * i for i in range(n)]
        assert all(abs(a - b) < 1e-9 for a, b in zip(smooth(line), line, strict=True))
    noisy = [i % 2 for i in range(100)]
    assert all(0.4 < x < 0.6 for x in smooth(noisy)[10:-10])


def test_the_end_of_the_curve_is_no_single_loss() -> None:
    draw = random.Random(0)
    for _ in range(20):
        values = [3.0 + draw.gauss(0, 0.1) for _ in range(500)]
        assert all(abs(x - 3.0) < 0.1 for x in smooth(values)[-20:])
    spiked = [3.0] * 499 + [9.0]
    assert smooth(spiked)[-1] < 3.5


@pytest.mark.parametrize("n", [20, 100, 1000])
def test_the_end_of_a_flattening_curve_does_not_overshoot(n: int) -> None:
    """A line through a loss that falls and then stays runs below its last values."""
    falling = [5.8 + 3 * math.exp(-6 * i / n) for i in range(n)]
    assert min(falling) <= smooth(falling)[-1] <= falling[-n // 10]
    flat = [6.4] * (n - 3) + [5.82, 5.80, 5.81]
    assert smooth(flat)[-1] >= 5.80


def test_the_first_losses_are_not_smoothed_away() -> None:
    falling = [3 + 8 * 0.8**i for i in range(1000)]
    assert smooth(falling)[0] == pytest.approx(falling[0], abs=0.2)


def test_pictures_of_nothing_and_of_little(tmp_path: Path) -> None:
    for rows in ([], [{"step": 1, "loss": 3.0}], [{"step": 1, "val": 3.0}], ROWS):
        draw(rows, tmp_path / "loss.png", "title")
        draw_all(rows, tmp_path / "curves.png", "title")
        draw_runs({"one": rows, "two": ROWS}, tmp_path / "runs.png", "time")
        for name in ("loss", "curves", "runs"):
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "curves.png", "runs.png"}


def test_the_experts_load_has_panels_of_its_own(tmp_path: Path) -> None:
    draw_all(ROWS, tmp_path / "experts.png", "title")
    draw_all([{k: v for k, v in row.items() if "load" not in k} for row in ROWS], tmp_path / "plain.png", "title")
    with Image.open(tmp_path / "experts.png") as experts, Image.open(tmp_path / "plain.png") as plain:
        assert experts.width == plain.width and experts.height == 1.5 * plain.height


def test_units_follow_from_the_longest_run() -> None:
    assert tokens_unit([[{"tokens": 5e9}], []]) == (1e-9, " (billions)")
    assert tokens_unit([]) == (1.0, "")
    assert time_unit([[{"seconds": 100}], [{"seconds": 5 * 3600}]]) == (1 / 3600, "hours")


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("")
    with pytest.raises(OneblockError, match="could not be written"):
        draw(ROWS, tmp_path / "none" / "loss.png", "title")
