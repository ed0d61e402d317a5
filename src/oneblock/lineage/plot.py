"""The picture of a comparison: parameters by part, KV cache by length, FLOPs per token, memory."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

from oneblock.errors import OneblockError
from oneblock.files import replace_file
from oneblock.lineage.table import Costs
from oneblock.plan import GPUS, cache, memory, params
from oneblock.units import format_bytes, format_count, format_flops

INK, FAINT = "#2b2b33", "#d9d9e0"
COLOURS = ("#3366cc", "#e07a1f", "#2a9d6f", "#b5479b", "#c0392b", "#6b5b95", "#8a7a3b", "#4b8fa8")
PARTS = dict(
    zip(params.PARTS, ("#7aa6d8", "#b7cfe8", "#e3a44b", "#5f9e6e", "#8cc29a", "#999", "#666", "#4a77b4"), strict=True)
)


def draw(costs: list[Costs], path: Path) -> None:
    """Write the picture in the format of the file's suffix (png, svg, pdf)."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(13, 4.6 + 0.7 * len(costs)), layout=layout, facecolor="white")
    axes = figure.subplots(2, 2)
    _parts(axes[0, 0], costs)
    _cache(axes[0, 1], costs)
    _work(axes[1, 0], costs)
    _memory(axes[1, 1], costs)
    try:
        with replace_file(path) as new:
            figure.savefig(new, dpi=150, format=path.suffix[1:] or "png")
    except ValueError as e:  # an unknown format
        raise OneblockError(f"{path}: {e}") from None


def _bare(ax: Axes, title: str, pad: float = 6) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=pad)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(colors=INK, labelsize=9, length=0, which="both")


def _parts(ax: Axes, costs: list[Costs]) -> None:
    """Shares of the total: totals differ a thousandfold, so they stand beside the names."""
    left = [0.0] * len(costs)
    for part in params.PARTS:
        shares = [100 * c.plan.parts[part] / c.plan.params_total for c in costs]
        if max(shares) >= 0.5:
            bars = ax.barh(range(len(costs)), shares, left=left, color=PARTS[part], label=part, height=0.62)
            ax.bar_label(bars, [f"{s:.0f}%" if s >= 6 else "" for s in shares], label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    ax.set_yticks(range(len(costs)), [f"{c.name}\n{format_count(c.plan.params_total)}" for c in costs])
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    _bare(ax, "Parameters by part")
    ax.set_xticks([])
    ax.spines[["bottom", "left"]].set_visible(False)
    ax.legend(ncols=6, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.02), handlelength=1)


def _cache(ax: Axes, costs: list[Costs]) -> None:
    plan = costs[0].plan
    top = max(plan.context, *(min(c.spec.context, 131072) for c in costs))
    lengths = sorted({plan.context, *(round(128 * 2 ** (i / 4)) for i in range(100))})
    lengths = [n for n in lengths if n <= top]
    itemsize = memory.compute_bytes(plan.dtype)
    for i, c in enumerate(costs):
        colour = COLOURS[i % len(COLOURS)]
        values = [cache.kv_bytes(c.spec, n, itemsize) for n in lengths]
        made_for = [n <= c.spec.context for n in lengths]
        known = sum(made_for)
        width = 2 + 2.5 * (1 - (i + 1) / len(costs))  # thinner and thinner: equal caches stay visible
        ax.plot(lengths[:known], values[:known], color=colour, lw=width, label=c.name)
        ax.plot(lengths[max(known - 1, 0) :], values[max(known - 1, 0) :], color=colour, lw=1.2, ls=":")
    ax.axvline(plan.context, color=FAINT, lw=1, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:.0f}K" if x >= 1024 else f"{x:.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_bytes(y)))
    ax.grid(axis="y", color=FAINT, lw=0.6)
    _bare(ax, "KV cache of one sequence (dotted: past the model's context)")
    ax.set_xlabel("tokens", fontsize=9, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _bars(ax: Axes, costs: list[Costs], groups: dict[str, list[float]], form: FuncFormatter) -> None:
    """Groups of horizontal bars, one bar per model, on a logarithmic axis, each with its value."""
    height = 0.8 / len(costs)
    for i, c in enumerate(costs):
        at = [g + (i - (len(costs) - 1) / 2) * height for g in range(len(groups))]
        values = [group[i] for group in groups.values()]
        bars = ax.barh(at, values, height * 0.9, color=COLOURS[i % len(COLOURS)], label=c.name)
        back = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.bar_label(bars, [form(v) for v in values], padding=4, fontsize=8, color=INK, bbox=back)
    ax.set_xscale("log")
    every = [v for group in groups.values() for v in group]
    ax.set_xlim(min(every) / 4, max(every) * 4)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(form)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _work(ax: Axes, costs: list[Costs]) -> None:
    groups = {
        "prefill": [c.plan.flops_prefill for c in costs],
        "decode": [c.plan.flops_decode for c in costs],
        "training": [c.plan.flops_train for c in costs],
    }
    _bars(ax, costs, groups, FuncFormatter(lambda x, _: format_flops(x)))
    _bare(ax, f"FLOPs per token, context {costs[0].plan.context:,}")


def _memory(ax: Axes, costs: list[Costs]) -> None:
    plan = costs[0].plan
    groups = {
        "serve": [float(c.plan.serving.total) for c in costs],
        "train,\ncheckpointed": [float(c.plan.training_checkpointed.total) for c in costs],
        "train": [float(c.plan.training.total) for c in costs],
    }
    _bars(ax, costs, groups, FuncFormatter(lambda x, _: format_bytes(x)))
    for name in ("rtx-4090", "h100"):
        gpu = GPUS[name]
        ax.axvline(gpu.memory, color=INK, lw=0.8, ls="--", zorder=0)
        at = ax.get_xaxis_transform()
        ax.text(gpu.memory, 1.01, format_bytes(gpu.memory), fontsize=8, color=INK, ha="center", transform=at)
    _bare(ax, f"Memory, {plan.batch} x {plan.context:,} tokens, {plan.dtype} (dashed: memory of one GPU)", pad=16)
