"""`loss.png`: how a run went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NEIGHBOURS = 25  # the curve over the raw losses is a mean over two 25ths of the run
TRAIN, VAL, FAINT = "#2563eb", "#ea580c", "#94a3b8"


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, fewer of them at the ends: unlike a trailing mean it does not lag."""
    reach = len(values) // NEIGHBOURS
    out = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        out.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return out


def draw(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Rows of metrics.jsonl: loss and validation loss over steps, written to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    val = [(row["step"], row["val"]) for row in rows if "val" in row]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=2, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color=VAL, linewidth=2, marker="o", markersize=4, label="validation")
        axes.annotate(f"{val[-1][1]:.3f}", val[-1], (-4, 8), textcoords="offset points", color=VAL, ha="right")
    axes.set_title(title, loc="left", fontsize=11, pad=10)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor="#334155")
    axes.margins(x=0.01)
    if train or val:
        axes.legend(frameon=False)
    new = path.with_name(f".{path.name}.new")
    figure.savefig(new, format="png")
    new.replace(path)
