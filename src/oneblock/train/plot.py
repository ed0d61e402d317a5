"""Pictures of a run: `loss.png`, `curves.png` with everything else, and several runs together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oneblock.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, float]
Points = list[tuple[float, float]]

NEIGHBOURS = 25  # the curve over the raw losses is fitted to two 25ths of the run at a time
FEW = 2  # to each side, at least
TRAIN, VAL, EMA, THIRD, FAINT, INK = "#2563eb", "#ea580c", "#16a34a", "#7c3aed", "#94a3b8", "#334155"
NOTE: dict[str, Any] = {"textcoords": "offset points", "color": VAL, "ha": "right"}
NOTE["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.7}
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#475569")


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value on a line through its neighbours: unlike a trailing mean it does not lag.

    As many neighbours before as after, fewer at the start, where losses fall fast. At the end, where there are none
    after, three more before for each that is missing: a line's end is as sure as its middle with twice as many points.
    """
    n = len(values)
    if n <= 2 * FEW:
        return [float(y) for y in values]
    at, reach = np.arange(n), max(n // NEIGHBOURS, FEW)
    near = np.minimum(reach, np.maximum(at, FEW))
    high = np.minimum(at + near, n - 1)
    low = np.maximum(at - np.minimum(near, at) - 3 * (at + near - high), 0)
    y = np.asarray(values, dtype=np.float64)
    sums, moments = (np.concatenate([[0.0], np.cumsum(x)]) for x in (y, at * y))
    count, middle = high - low + 1, (high + low) / 2
    total = sums[high + 1] - sums[low]
    slope = (moments[high + 1] - moments[low] - middle * total) * 12 / (count * (count**2 - 1))
    return (total / count + slope * (at - middle)).tolist()


# ------------------------------------------------------------------ one run


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Rows of metrics.jsonl: loss and validation loss over steps, written to a PNG."""
    figure = blank(8, 4.5)
    axes = figure.add_subplot()
    losses(axes, rows, "step")
    axes.set_title(title, loc="left", fontsize=11, pad=10)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    write(figure, path)


def draw_all(rows: Sequence[Row], path: Path, title: str) -> None:
    """Loss against tokens and against time, throughput, learning rate and gradient; the experts' load where known."""
    panels: list[Callable[[Axes, Sequence[Row]], None]] = [against_tokens, against_time, throughput, rate]
    if any("max_load" in row for row in rows):
        panels += [load, balance]
    figure = blank(12, 3.6 * (len(panels) // 2))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for panel, axes in zip(panels, figure.subplots(len(panels) // 2, 2, squeeze=False).flat, strict=True):
        panel(axes, rows)
    write(figure, path)


def losses(axes: Axes, rows: Sequence[Row], x: str, scale: float = 1.0) -> None:
    """Training loss, raw and smoothed, and what was measured on the validation text, over the key `x` of the rows."""
    train = points(rows, x, "loss", scale)
    if train:
        at, found = zip(*train, strict=True)
        axes.plot(at, found, color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(at, smoothed(found), color=TRAIN, linewidth=2, label="training")
    for key, colour, label in (("val", VAL, "validation"), ("val_ema", EMA, "validation, averaged weights")):
        if seen := points(rows, x, key, scale):
            axes.plot(*zip(*seen, strict=True), color=colour, linewidth=2, marker="o", markersize=4, label=label)
    if seen := points(rows, x, "val", scale):
        axes.annotate(f"{seen[-1][1]:.3f}", seen[-1], (-4, 8), **NOTE)
    plain(axes)
    if axes.lines:
        axes.legend(frameon=False)


def against_tokens(axes: Axes, rows: Sequence[Row]) -> None:
    scale, unit = tokens_unit([rows])
    losses(axes, rows, "tokens", scale)
    axes.set(xlabel=f"tokens{unit}", ylabel="loss (nats per token)")


def against_time(axes: Axes, rows: Sequence[Row]) -> None:
    scale, unit = time_unit([rows])
    losses(axes, rows, "seconds", scale)
    axes.set(xlabel=f"time ({unit})", ylabel="loss (nats per token)")


def throughput(axes: Axes, rows: Sequence[Row]) -> None:
    """Tokens per second; on the right the share of the machine's measured peak."""
    scale, unit = time_unit([rows])
    found = points(rows, "seconds", "speed", scale)
    if found:
        at, speed = zip(*found, strict=True)
        axes.plot(at, speed, color=TRAIN, alpha=0.35, linewidth=1)
        axes.plot(at, smoothed(speed), color=TRAIN, linewidth=2)
    plain(axes)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=f"time ({unit})", ylabel="tokens per second")
    ratios = [row["mfu"] / row["speed"] for row in rows if row.get("mfu") and row.get("speed")]
    if ratios:  # the same curve on another scale
        share = 100 * ratios[-1]
        right = axes.secondary_yaxis("right", functions=(partial(np.multiply, share), partial(np.multiply, 1 / share)))
        right.set_ylabel("% of the measured peak (MFU)")
        right.tick_params(color=FAINT, labelcolor=INK)
        right.spines["right"].set_color(FAINT)


def rate(axes: Axes, rows: Sequence[Row]) -> None:
    """The gradient's norm, and on the right the learning rate."""
    norm, lr = points(rows, "step", "norm"), points(rows, "step", "lr")
    if norm:
        at, found = zip(*norm, strict=True)
        axes.plot(at, found, color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(at, smoothed(found), color=TRAIN, linewidth=2)
        if min(found) > 0 and max(found) > 20 * min(found):
            axes.set_yscale("log")
    plain(axes)
    axes.set(xlabel="step")
    axes.set_ylabel("norm of the gradient", color=TRAIN)
    if lr:
        right = axes.twinx()
        right.plot(*zip(*lr, strict=True), color=VAL, linewidth=2)
        plain(right)
        right.grid(False)
        right.spines["right"].set(visible=True, color=FAINT)
        right.set_ylim(bottom=0)
        right.set_ylabel("learning rate", color=VAL)


def load(axes: Axes, rows: Sequence[Row]) -> None:
    """The busiest and the idlest expert of any layer."""
    for key, colour, label in (("max_load", VAL, "busiest expert"), ("min_load", TRAIN, "idlest expert")):
        if found := points(rows, "step", key, 100):
            axes.plot(*zip(*found, strict=True), color=colour, linewidth=1.5, label=label)
    plain(axes)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel="% of a layer's tokens")
    axes.legend(frameon=False)


def balance(axes: Axes, rows: Sequence[Row]) -> None:
    if found := points(rows, "step", "load_balancing_loss"):
        axes.plot(*zip(*found, strict=True), color=THIRD, linewidth=1.5)
    plain(axes)
    axes.set(xlabel="step", ylabel="balance (1: even)")


# ------------------------------------------------------------------ several runs


def draw_runs(runs: dict[str, Sequence[Row]], path: Path, x: str = "tokens") -> None:
    """Training (thin, smoothed) and validation loss (thick) of several runs over `x`: tokens, time or steps."""
    figure = blank(9, 5.5)
    axes = figure.add_subplot()
    key = {"tokens": "tokens", "time": "seconds", "steps": "step"}[x]
    units = {"tokens": tokens_unit, "time": time_unit, "steps": lambda _: (1.0, "")}
    scale, unit = units[x](list(runs.values()))
    for i, (name, rows) in enumerate(runs.items()):
        colour, named = COLOURS[i % len(COLOURS)], False
        if train := points(rows, key, "loss", scale):
            at, found = zip(*train, strict=True)
            val = any("val" in row for row in rows)
            look: dict[str, Any] = {"alpha": 0.5, "linewidth": 1.2} if val else {"linewidth": 2, "label": name}
            axes.plot(at, smoothed(found), color=colour, **look)
            named = not val
        if seen := points(rows, key, "val", scale):
            label = None if named else f"{name}: {seen[-1][1]:.3f}"
            axes.plot(*zip(*seen, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4, label=label)
    zoom(axes, runs.values())
    axes.set(ylabel="loss (nats per token)", xlabel={"time": f"time ({unit})", "steps": "step"}.get(x, f"tokens{unit}"))
    axes.set_title("thick: validation, thin: training (smoothed)", loc="left", fontsize=10, color=INK)
    plain(axes)
    axes.legend(frameon=False)
    write(figure, path)


def zoom(axes: Axes, runs: Any) -> None:
    """Cut the first steps' losses off at the top: where runs differ is at the end."""
    heights = []
    for rows in runs:
        found = [row["loss"] for row in rows if "loss" in row] or [row["val"] for row in rows if "val" in row]
        heights.append(sorted(found)[int(0.95 * (len(found) - 1))] if found else 0.0)
    low, high = axes.get_ylim()
    if 0 < max(heights) < high:
        axes.set_ylim(low, max(heights) + 0.05 * (max(heights) - low))


# ------------------------------------------------------------------ parts


def points(rows: Sequence[Row], x: str, y: str, scale: float = 1.0) -> Points:
    """What the rows say of `y` over `x`; `scale` changes the unit of the one that has one."""
    shares = y in ("max_load", "min_load")
    return [
        (row[x] * (1.0 if shares else scale), row[y] * (scale if shares else 1.0))
        for row in rows
        if row.get(x) is not None and row.get(y) is not None
    ]


def tokens_unit(runs: Sequence[Sequence[Row]]) -> tuple[float, str]:
    most = max((row.get("tokens", 0) for rows in runs for row in rows), default=0)
    for size, name in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if most >= 2 * size:
            return 1 / size, name
    return 1.0, ""


def time_unit(runs: Sequence[Sequence[Row]]) -> tuple[float, str]:
    most = max((row.get("seconds", 0) for rows in runs for row in rows), default=0)
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if most >= 3 * size:
            return 1 / size, name
    return 1.0, "seconds"


def blank(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, which="both")
    axes.margins(x=0.01)


def write(figure: Figure, path: Path) -> None:
    """Write the figure as PNG."""
    with replace_file(path) as new:
        figure.savefig(new, format="png")
