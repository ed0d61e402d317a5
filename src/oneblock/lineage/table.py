"""Rows and tables of the lineage's commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from oneblock.plan import cache, params
from oneblock.plan.describe import Change
from oneblock.spec import Model, Spec

if TYPE_CHECKING:
    from oneblock.lineage.commands import Costs

WIDTH = 130

# ------------------------------------------------------------------ numbers in a few characters


def scaled(x: float, unit: str, steps: str = " kMGTPEZY") -> str:
    """8030261248 -> "8.03 G" + unit: three figures and a decimal prefix, as data sheets have them."""
    step = 0
    while abs(x) >= 999.5 and step < len(steps) - 1:
        x, step = x / 1000, step + 1
    figures = f"{x:.3g}" if abs(x) < 99.95 else f"{x:.0f}"
    return f"{figures} {steps[step].strip()}{unit}".rstrip()


def count(x: float) -> str:
    return scaled(x, "", " KMBT")


def size(x: float) -> str:
    return scaled(x, "B")


def work(x: float) -> str:
    return scaled(x, "FLOP")


def money(x: float) -> str:
    return f"${x:,.0f}" if x >= 10 else f"${x:.2f}"


def duration(seconds: float) -> str:
    for name, length in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.3g} {name}"
    return f"{seconds:.3g} seconds"


def ratio(x: float, first: float) -> str:
    if x == 0 or first == 0:
        return "new" if x else ""
    times = x / first
    return f"{times:,.0f}x" if times >= 99.95 else f"{times:.3g}x"


# ------------------------------------------------------------------ models


def model_row(model: Model, spec: Spec) -> dict[str, Any]:
    """One model, as `oneblock models --json` prints it; a vision model's text side."""
    attn = [x.attn for x in spec.layers]
    return {
        "name": model.name,
        "title": model.title,
        "family": model.family,
        "params_total": params.total(spec),
        "params_active": params.total(spec, active=True),
        "vocab": spec.vocab,
        "dim": spec.dim,
        "n_layers": spec.n_layers,
        "n_heads": attn[0].n_heads,
        "n_kv_heads": attn[0].n_kv_heads,
        "head_dim": attn[0].head_dim,
        "context": spec.context,
        "window": max((a.window or a.chunk or 0 for a in attn), default=0) or None,
        "tied": spec.tied,
        "kv_bytes_per_token": cache.kv_bytes_per_token(spec),  # bfloat16
    }


# Column, what a row says there; the last ones are left out where they do not fit.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "name": lambda r: f"[cyan]{r['name']}[/cyan]",
    "parameters": lambda r: f"{r['params_total']:,}",
    "active": lambda r: f"{r['params_active']:,}" if r["params_active"] != r["params_total"] else "[dim]all[/dim]",
    "layers": lambda r: str(r["n_layers"]),
    "width": lambda r: f"{r['dim']:,}",
    "heads": lambda r: f"{r['n_heads']}/{r['n_kv_heads']} x {r['head_dim']}",
    "context": lambda r: f"{r['context']:,}",
    "KV/token": lambda r: size(r["kv_bytes_per_token"]),
    "vocab": lambda r: f"{r['vocab']:,}",
}


def models(rows: list[dict[str, Any]], width: int) -> Table:
    """The lineage in as many columns as `width` characters hold."""
    cells = {name: [words(row) for row in rows] for name, words in COLUMNS.items()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name, column in cells.items():
        width -= 2 + max(Text.from_markup(c).cell_len for c in (name, *column))
        if width < 0:
            break
        table.add_column(name, justify="left" if name == "name" else "right", no_wrap=True)
    for i, row in enumerate(rows):
        last = i + 1 < len(rows) and rows[i + 1]["family"] != row["family"]
        table.add_row(*(column[i] for column in list(cells.values())[: len(table.columns)]), end_section=last)
    table.caption = "heads: query/KV x width. KV/token: bytes of keys and values a token adds, 16-bit."
    return table


# ------------------------------------------------------------------ compare


@dataclass(frozen=True)
class Metric:
    key: str
    section: str
    label: str
    form: Callable[[float], str]
    of: Callable[[Costs], float]
    bold: bool = False


def metrics(costs: list[Costs], where: str, utilisation: float) -> Iterator[Metric]:
    """What a comparison shows, line by line."""
    p = costs[0].plan
    yield from _parameters(costs)
    cached = f"KV cache, {p.serving_dtype}"
    yield Metric("kv_bytes_per_token", cached, "a token", size, lambda c: c.plan.kv_bytes_per_token)
    yield Metric("kv_bytes", cached, f"a text of {p.context:,} tokens", size, lambda c: c.plan.kv_bytes, bold=True)
    if p.batch > 1:
        yield Metric("kv_bytes_batch", cached, f"{p.batch} such texts", size, lambda c: c.plan.serving.cache)
    each = f"Per token, at {p.context:,}"
    yield Metric("flops_prefill", each, "prefill (mean)", work, lambda c: c.plan.flops_prefill, bold=True)
    yield Metric("flops_decode", each, "decode (last)", work, lambda c: c.plan.flops_decode)
    yield Metric("flops_train", each, "training", work, lambda c: c.plan.flops_train)
    moved = f"moved to decode, batch {p.batch}"
    yield Metric("bytes_decode", each, moved, size, lambda c: c.plan.bytes_decode)
    yield from _memory(p.batch, p.context, p.dtype)
    training = f"Training on {where} at {utilisation:.0%}"
    law = "optimal tokens, fitted law"
    yield Metric("optimal_tokens", training, "optimal tokens, 20 to 1", count, lambda c: c.plan.optimal_tokens)
    yield Metric("optimal_tokens_law", training, law, count, lambda c: c.plan.optimal_tokens_law)
    yield Metric("tokens", training, "tokens trained on", count, lambda c: c.run.tokens)
    yield Metric("train_flops", training, "work", work, lambda c: c.run.flops)
    yield Metric("seconds", training, "time", duration, lambda c: c.run.seconds, bold=True)
    yield Metric("dollars", training, "cost", money, lambda c: c.run.dollars, bold=True)


def _parameters(costs: list[Costs]) -> Iterator[Metric]:
    yield Metric("params_total", "Parameters", "total", count, lambda c: c.plan.params_total, bold=True)
    if any(c.plan.params_active != c.plan.params_total for c in costs):
        yield Metric("params_active", "Parameters", "active per token", count, lambda c: c.plan.params_active)
    for part in params.PARTS:
        if any(c.plan.parts[part] for c in costs):
            yield Metric(f"params_{part}", "Parameters", f"  {part}", count, lambda c, part=part: c.plan.parts[part])


def _memory(batch: int, context: int, dtype: str) -> Iterator[Metric]:
    serve = f"Memory to serve {batch} x {context:,}, {dtype}"
    yield Metric("serving_weights", serve, "  weights", size, lambda c: c.plan.serving.weights)
    yield Metric("serving_cache", serve, "  cache", size, lambda c: c.plan.serving.cache)
    yield Metric("serving_workspace", serve, "  workspace", size, lambda c: c.plan.serving.workspace)
    yield Metric("serving_total", serve, "total", size, lambda c: c.plan.serving.total, bold=True)
    train = f"Memory to train, {batch} x {context:,} a step"
    yield Metric("training_states", train, "  weights, gradients, AdamW", size, lambda c: c.plan.training.states)
    yield Metric("training_activations", train, "  activations", size, lambda c: c.plan.training.activations)
    kept = "  activations, checkpointed"
    yield Metric(
        "training_checkpointed_activations", train, kept, size, lambda c: c.plan.training_checkpointed.activations
    )
    yield Metric("training_loss", train, "  loss", size, lambda c: c.plan.training.loss + c.plan.training.head)
    yield Metric("training_total", train, "total", size, lambda c: c.plan.training.total, bold=True)
    total = "total, checkpointed"
    yield Metric("training_checkpointed_total", train, total, size, lambda c: c.plan.training_checkpointed.total)


def comparisons(costs: list[Costs], where: str, utilisation: float, width: int) -> list[Table]:
    """One table, or several where one would be wider than `width`; the first model is in each."""
    first, others = costs[0], costs[1:]
    for n in range(len(others), 0, -1):
        groups = [[first, *others[i : i + n]] for i in range(0, len(others), n)]
        tables = [comparison(group, where, utilisation) for group in groups]
        if n == 1 or all(Console(width=10_000).measure(t).maximum <= width for t in tables):
            return tables
    return [comparison(costs, where, utilisation)]


def comparison(costs: list[Costs], where: str, utilisation: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for i, c in enumerate(costs):
        table.add_column(f"[cyan]{c.name}[/cyan]", justify="right", no_wrap=True)
        if i:
            table.add_column("", justify="right", style="dim", no_wrap=True)
    section = ""
    for metric in metrics(costs, where, utilisation):
        if metric.section != section:
            section = metric.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(f"  {metric.label}", *_cells(metric, costs), style="bold" if metric.bold else "")
    return table


def _cells(metric: Metric, costs: list[Costs]) -> Iterator[str]:
    first = metric.of(costs[0])
    for i, c in enumerate(costs):
        value = metric.of(c)
        yield metric.form(value) if value else "-"
        if i:
            yield ratio(value, first)


def json_row(c: Costs, first: Costs) -> dict[str, Any]:
    """One column of the comparison; `ratios` are against the first."""
    shown = list(metrics([first, c], "", 0))
    p = asdict(c.plan)
    for key in ("serving", "training", "training_checkpointed"):
        p[key]["total"] = getattr(c.plan, key).total
    values = {m.key: (m.of(c), m.of(first)) for m in shown}
    ratios = {key: x / base for key, (x, base) in values.items() if base}
    return {"name": c.name, **p, "run": asdict(c.run), "ratios": ratios}


# ------------------------------------------------------------------ diff


def changes(before: str, after: str, found: list[Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column(f"[cyan]{before}[/cyan]", overflow="fold", ratio=1)
    table.add_column("")
    table.add_column(f"[cyan]{after}[/cyan]", overflow="fold", ratio=1)
    for change in found:
        table.add_row(change.what, change.before, "->", change.after)
    return table
