"""Plots of a run: `loss.png`, `curves.png` with every curve, and the loss curves of several runs together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

SMOOTHING = 25  # the smoothed curve is a local linear fit over two 25ths of the run
MIN_REACH = 2  # points to each side, at least
TRAIN, VAL, EMA, THIRD, FAINT, INK = "#2563eb", "#ea580c", "#16a34a", "#7c3aed", "#94a3b8", "#334155"
NOTE: dict[str, Any] = {"textcoords": "offset points", "color": VAL, "ha": "right"}
NOTE["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.7}
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#475569")


def smooth(values: Sequence[float]) -> list[float]:
    """A local linear fit (lowess without weights) that neither lags nor leaves the range of the values it is fitted to.

    Windows are symmetric, and shorter at the start, where losses fall fast. At the end three earlier points replace
    each missing later one: the end of a line needs about four times the points of its middle. A line fitted to a curve
    that flattens runs below it, so the end is clamped to the range of its window.
    """
    n = len(values)
    if n <= 2 * MIN_REACH:
        return [float(y) for y in values]
    index, reach = np.arange(n), max(n // SMOOTHING, MIN_REACH)
    radius = np.minimum(reach, np.maximum(index, MIN_REACH))
    high = np.minimum(index + radius, n - 1)
    low = np.maximum(index - np.minimum(radius, index) - 3 * (index + radius - high), 0)
    y = np.asarray(values, dtype=np.float64)
    sums, moments = (np.concatenate([[0.0], np.cumsum(x)]) for x in (y, index * y))
    count, center = high - low + 1, (high + low) / 2
    total = sums[high + 1] - sums[low]
    slope = (moments[high + 1] - moments[low] - center * total) * 12 / (count * (count**2 - 1))
    fitted = total / count + slope * (index - center)
    for i in np.flatnonzero(2 * index != high + low):  # one-sided windows extrapolate
        window = y[low[i] : high[i] + 1]
        fitted[i] = min(max(fitted[i], window.min()), window.max())
    return fitted.tolist()


# ------------------------------------------------------------------ one run


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot training and validation loss over steps from the rows of metrics.jsonl, as PNG."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    plot_losses(axes, rows, "step")
    axes.set_title(title, loc="left", fontsize=11, pad=10)
    axes.set(xlabel="step")
    save_png(figure, path)


def draw_all(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot loss over tokens and time, throughput, gradient norm and learning rate; expert load for MoE models."""
    panels: list[Callable[[Axes, Sequence[Row]], None]] = [
        plot_loss_over_tokens,
        plot_loss_over_time,
        plot_throughput,
        plot_grad_norm,
    ]
    if any("max_load" in row for row in rows):
        panels += [plot_expert_load, plot_load_balancing_loss]
    figure = new_figure(12, 3.6 * (len(panels) // 2))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for panel, axes in zip(panels, figure.subplots(len(panels) // 2, 2, squeeze=False).flat, strict=True):
        panel(axes, rows)
    save_png(figure, path)


def plot_losses(axes: Axes, rows: Sequence[Row], x: str, scale: float = 1.0) -> None:
    """Training loss, raw and smoothed, and validation losses, over the key `x` of the rows."""
    plot_smoothed(axes, points(rows, x, "loss", scale), label="training")
    for key, colour, label in (("val", VAL, "validation"), ("val_ema", EMA, "validation, EMA weights")):
        plot_points(axes, points(rows, x, key, scale), colour, label)
    if validation := points(rows, x, "val", scale):
        axes.annotate(f"{validation[-1][1]:.3f}", validation[-1], (-4, 8), **NOTE)
    axes.set(ylabel="loss (nats per token)")
    style_axes(axes)
    if axes.lines:
        axes.legend(frameon=False)


def plot_loss_over_tokens(axes: Axes, rows: Sequence[Row]) -> None:
    scale, unit = tokens_unit([rows])
    plot_losses(axes, rows, "tokens", scale)
    axes.set(xlabel=f"tokens{unit}")


def plot_loss_over_time(axes: Axes, rows: Sequence[Row]) -> None:
    scale, unit = time_unit([rows])
    plot_losses(axes, rows, "seconds", scale)
    axes.set(xlabel=f"time ({unit})")


def plot_throughput(axes: Axes, rows: Sequence[Row]) -> None:
    """Tokens per second; the right axis shows MFU."""
    scale, unit = time_unit([rows])
    plot_smoothed(axes, points(rows, "seconds", "speed", scale))
    style_axes(axes)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=f"time ({unit})", ylabel="tokens per second")
    ratios = [row["mfu"] / row["speed"] for row in rows if row.get("mfu") and row.get("speed")]
    if ratios:  # the same curve on another scale
        percent = 100 * ratios[-1]
        scales = partial(np.multiply, percent), partial(np.multiply, 1 / percent)
        right = axes.secondary_yaxis("right", functions=scales)
        right.set_ylabel("MFU (% of the measured peak)")
        right.tick_params(color=FAINT, labelcolor=INK)
        right.spines["right"].set_color(FAINT)


def plot_grad_norm(axes: Axes, rows: Sequence[Row]) -> None:
    """Gradient norm; the right axis shows the learning rate."""
    norms = points(rows, "step", "grad_norm")
    plot_smoothed(axes, norms)
    values = [y for _, y in norms]
    if norms and 0 < 20 * min(values) < max(values):
        axes.set_yscale("log")
    style_axes(axes)
    axes.set(xlabel="step")
    axes.set_ylabel("gradient norm", color=TRAIN)
    if rates := points(rows, "step", "lr"):
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), color=VAL, linewidth=2)
        style_axes(right)
        right.grid(False)
        right.spines["right"].set(visible=True, color=FAINT)
        right.set_ylim(bottom=0)
        right.set_ylabel("learning rate", color=VAL)


def plot_expert_load(axes: Axes, rows: Sequence[Row]) -> None:
    """Load of the most and the least used expert of any layer."""
    for key, colour, label in (("max_load", VAL, "most used expert"), ("min_load", TRAIN, "least used expert")):
        loads = [(step, 100 * share) for step, share in points(rows, "step", key)]
        if loads:
            axes.plot(*zip(*loads, strict=True), color=colour, linewidth=1.5, label=label)
    style_axes(axes)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel="% of a layer's tokens")
    axes.legend(frameon=False)


def plot_load_balancing_loss(axes: Axes, rows: Sequence[Row]) -> None:
    if losses := points(rows, "step", "load_balancing_loss"):
        axes.plot(*zip(*losses, strict=True), color=THIRD, linewidth=1.5)
    style_axes(axes)
    axes.set(xlabel="step", ylabel="load balancing loss (1: even)")


# ------------------------------------------------------------------ several runs


def draw_runs(runs: dict[str, Sequence[Row]], path: Path, x: str = "tokens") -> None:
    """Plot training (thin, smoothed) and validation loss (thick) of several runs over `x`: tokens, time or steps."""
    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    key = {"tokens": "tokens", "time": "seconds", "steps": "step"}[x]
    units = {"tokens": tokens_unit, "time": time_unit, "steps": lambda _: (1.0, "")}
    scale, unit = units[x](list(runs.values()))
    for i, (name, rows) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        train, validation = points(rows, key, "loss", scale), points(rows, key, "val", scale)
        style: dict[str, Any] = {"alpha": 0.5, "linewidth": 1.2} if validation else {"linewidth": 2, "label": name}
        if train:
            steps, losses = zip(*train, strict=True)
            axes.plot(steps, smooth(losses), color=colour, **style)
        if validation:
            plot_points(axes, validation, colour, f"{name}: {validation[-1][1]:.3f}")
    limit_axis(axes, runs.values())
    xlabel = {"time": f"time ({unit})", "steps": "step"}.get(x, f"tokens{unit}")
    axes.set(ylabel="loss (nats per token)", xlabel=xlabel)
    axes.set_title("thick: validation, thin: training (smoothed)", loc="left", fontsize=10, color=INK)
    style_axes(axes)
    axes.legend(frameon=False)
    save_png(figure, path)


def limit_axis(axes: Axes, runs: Iterable[Sequence[Row]]) -> None:
    """Limit the y axis to the 95th percentile of the losses, so that the end of the curves is visible."""
    tops = []
    for rows in runs:
        losses = [row["loss"] for row in rows if "loss" in row] or [row["val"] for row in rows if "val" in row]
        tops.append(sorted(losses)[int(0.95 * (len(losses) - 1))] if losses else 0.0)
    low, high = axes.get_ylim()
    if 0 < max(tops) < high:
        axes.set_ylim(low, max(tops) + 0.05 * (max(tops) - low))


# ------------------------------------------------------------------ parts


def plot_smoothed(axes: Axes, curve: Points, label: str | None = None) -> None:
    """A faint raw curve under its smoothed form; nothing for no points."""
    if curve:
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(x, smooth(y), color=TRAIN, linewidth=2, label=label)


def plot_points(axes: Axes, curve: Points, colour: str, label: str) -> None:
    if curve:
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4, label=label)


def points(rows: Sequence[Row], x: str, y: str, scale: float = 1.0) -> Points:
    """The points (scale * x, y) of the rows that have both."""
    return [(row[x] * scale, row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]


def tokens_unit(runs: Sequence[Sequence[Row]]) -> tuple[float, str]:
    """Factor and name of the unit for the most tokens of any run."""
    most = max((row.get("tokens", 0) for rows in runs for row in rows), default=0)
    for size, name in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if most >= 2 * size:
            return 1 / size, name
    return 1.0, ""


def time_unit(runs: Sequence[Sequence[Row]]) -> tuple[float, str]:
    """Factor and name of the unit for the longest run."""
    most = max((row.get("seconds", 0) for rows in runs for row in rows), default=0)
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if most >= 3 * size:
            return 1 / size, name
    return 1.0, "seconds"


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes) -> None:
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, which="both")
    axes.margins(x=0.01)


def save_png(figure: Figure, path: Path) -> None:
    with replace_file(path) as new:
        figure.savefig(new, format="png")
