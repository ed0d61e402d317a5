from __future__ import annotations

from pathlib import Path

from oneblock.train.plot import draw, smoothed


def test_smoothing_keeps_the_ends_and_does_not_lag() -> None:
    line = [10.0 - 0.1 * i for i in range(100)]
    assert all(abs(a - b) < 1e-9 for a, b in zip(smoothed(line), line, strict=True))
    assert smoothed([]) == []
    noisy = [i % 2 for i in range(100)]
    assert all(0.4 < x < 0.6 for x in smoothed(noisy)[10:-10])


def test_a_picture_of_nothing_and_of_one_look(tmp_path: Path) -> None:
    for rows in ([], [{"step": 1, "loss": 3.0}], [{"step": 1, "val": 3.0}]):
        draw(rows, tmp_path / "loss.png", "title")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
