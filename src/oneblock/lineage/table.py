"""Rows and tables of `oneblock models`, `compare` and `diff`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from oneblock.plan import Plan, Run, cache, params
from oneblock.plan.describe import Change
from oneblock.spec import Model, Spec
from oneblock.units import format_bytes, format_count, format_duration, format_flops, format_money, format_ratio

PIPE_WIDTH = 1000  # columns of a pipe: no table is wider

# ------------------------------------------------------------------ models


def model_row(model: Model, spec: Spec) -> dict[str, Any]:
    """One row of `oneblock models --json`."""
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


# Column title -> cell of a row; a terminal that is too narrow leaves out the last ones, and the caption says which.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "name": lambda r: f"[cyan]{r['name']}[/cyan]",
    "parameters": lambda r: f"{r['params_total']:,}",
    "active": lambda r: f"{r['params_active']:,}" if r["params_active"] != r["params_total"] else "[dim]all[/dim]",
    "layers": lambda r: str(r["n_layers"]),
    "dim": lambda r: f"{r['dim']:,}",
    "heads": lambda r: f"{r['n_heads']}/{r['n_kv_heads']} x {r['head_dim']}",
    "context": lambda r: f"{r['context']:,}",
    "KV/token": lambda r: format_bytes(r["kv_bytes_per_token"]),
    "vocab": lambda r: f"{r['vocab']:,}",
}


def models_table(rows: list[dict[str, Any]], width: int) -> Table:
    """The models in as many columns as `width` characters hold; no number is ever cut."""
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    shown: list[str] = []
    for name, column in cells.items():
        width -= 2 + max(Text.from_markup(c).cell_len for c in (name, *column))
        if width < 0 and len(shown) >= 2:  # name and parameters always stay
            break
        shown.append(name)
    omitted = [name for name in cells if name not in shown]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in shown:
        table.add_column(name, justify="left" if name == "name" else "right", no_wrap=True, overflow="ignore")
    for i, row in enumerate(rows):
        last = i + 1 < len(rows) and rows[i + 1]["family"] != row["family"]
        table.add_row(*(cells[name][i] for name in shown), end_section=last)
    legend = "heads: query/KV x head_dim. KV/token: bytes of keys and values per token, 16-bit."
    narrow = f" Too narrow for: {', '.join(omitted)} (widen the terminal, or --json)." if omitted else ""
    table.caption = legend + narrow
    return table


# ------------------------------------------------------------------ compare


@dataclass(frozen=True)
class Costs:
    """One column of a comparison."""

    name: str
    spec: Spec
    plan: Plan
    run: Run


@dataclass(frozen=True)
class Metric:
    """One line of a comparison; `path` leads from `Costs` to its value."""

    key: str
    section: str
    label: str
    form: Callable[[float], str]
    path: str

    def value(self, costs: Costs) -> float:
        value: Any = costs
        for name in self.path.split("."):
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        return value


BOLD = {"params_total", "kv_bytes", "flops_prefill", "serving_total", "training_total", "seconds", "dollars"}


Line = tuple[str, str, Callable[[float], str], str]  # key, label, format, path


def metrics(costs: list[Costs], hardware: str, mfu: float) -> list[Metric]:
    """The lines of a comparison."""
    p = costs[0].plan
    cache: list[Line] = [
        ("kv_bytes_per_token", "per token", format_bytes, "plan.kv_bytes_per_token"),
        ("kv_bytes", f"{p.context:,} tokens", format_bytes, "plan.kv_bytes"),
        ("kv_bytes_batch", f"{p.batch} x {p.context:,} tokens", format_bytes, "plan.serving.cache"),
    ]
    sections: dict[str, list[Line]] = {
        "Parameters": _parameters(costs),
        f"KV cache, {p.serving_dtype}": cache if p.batch > 1 else cache[:2],
        f"Per token, context {p.context:,}": [
            ("flops_prefill", "prefill (mean)", format_flops, "plan.flops_prefill"),
            ("flops_decode", "decode (last)", format_flops, "plan.flops_decode"),
            ("flops_train", "training", format_flops, "plan.flops_train"),
            ("bytes_decode", f"bytes moved to decode, batch {p.batch}", format_bytes, "plan.bytes_decode"),
        ],
        f"Memory to serve {p.batch} x {p.context:,}, {p.dtype}": SERVING,
        f"Memory to train, micro-batch {p.batch} x {p.context:,}": TRAINING,
        f"Training on {hardware} at {mfu:.0%} MFU": [
            ("optimal_tokens", "optimal tokens, 20 per parameter", format_count, "plan.optimal_tokens"),
            ("optimal_tokens_law", "optimal tokens, fitted law", format_count, "plan.optimal_tokens_law"),
            ("tokens", "training tokens", format_count, "run.tokens"),
            ("train_flops", "FLOPs", format_flops, "run.flops"),
            ("seconds", "time", format_duration, "run.seconds"),
            ("dollars", "cost", format_money, "run.dollars"),
        ],
    }
    lines = [(section, line) for section, lines in sections.items() for line in lines]
    return [Metric(key, section, label, form, path) for section, (key, label, form, path) in lines]


def _parameters(costs: list[Costs]) -> list[Line]:
    lines: list[Line] = [("params_total", "total", format_count, "plan.params_total")]
    if any(c.plan.params_active != c.plan.params_total for c in costs):
        lines.append(("params_active", "active per token", format_count, "plan.params_active"))
    parts = [part for part in params.PARTS if any(c.plan.parts[part] for c in costs)]
    return lines + [(f"params_{part}", f"  {part}", format_count, f"plan.parts.{part}") for part in parts]


SERVING: list[Line] = [
    ("serving_weights", "  weights", format_bytes, "plan.serving.weights"),
    ("serving_cache", "  KV cache", format_bytes, "plan.serving.cache"),
    ("serving_workspace", "  activations", format_bytes, "plan.serving.workspace"),
    ("serving_total", "total", format_bytes, "plan.serving.total"),
]
FULL = "plan.training_checkpointed"
TRAINING: list[Line] = [
    ("training_states", "  weights, gradients, AdamW", format_bytes, "plan.training.states"),
    ("training_activations", "  activations", format_bytes, "plan.training.activations"),
    ("training_checkpointed_activations", "  activations, checkpointed", format_bytes, f"{FULL}.activations"),
    ("training_loss", "  loss", format_bytes, "plan.training.loss_total"),
    ("training_total", "total", format_bytes, "plan.training.total"),
    ("training_checkpointed_total", "total, checkpointed", format_bytes, f"{FULL}.total"),
]


def comparison_tables(costs: list[Costs], hardware: str, mfu: float, width: int) -> list[Table]:
    """One table, or several where one is wider than `width`; each has the first model as its base."""
    first, others = costs[0], costs[1:]
    for n in range(len(others), 0, -1):
        groups = [[first, *others[i : i + n]] for i in range(0, len(others), n)]
        tables = [comparison_table(group, hardware, mfu) for group in groups]
        if n == 1 or all(Console(width=10_000).measure(t).maximum <= width for t in tables):
            return tables
    return [comparison_table(costs, hardware, mfu)]


def comparison_table(costs: list[Costs], hardware: str, mfu: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for i, c in enumerate(costs):
        table.add_column(f"[cyan]{c.name}[/cyan]", justify="right", no_wrap=True)
        if i:
            table.add_column("", justify="right", style="dim", no_wrap=True)
    section = ""
    for metric in metrics(costs, hardware, mfu):
        if metric.section != section:
            section = metric.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(f"  {metric.label}", *_cells(metric, costs), style="bold" if metric.key in BOLD else "")
    return table


def _cells(metric: Metric, costs: list[Costs]) -> Iterator[str]:
    first = metric.value(costs[0])
    for i, c in enumerate(costs):
        value = metric.value(c)
        yield metric.form(value) if value else "-"
        if i:
            yield format_ratio(value, first)


def json_row(c: Costs, first: Costs) -> dict[str, Any]:
    """One column of the comparison; `ratios` are against the first."""
    shown = list(metrics([first, c], "", 0))
    p = asdict(c.plan)
    for key in ("serving", "training", "training_checkpointed"):
        p[key]["total"] = getattr(c.plan, key).total
    values = {m.key: (m.value(c), m.value(first)) for m in shown}
    ratios = {key: x / base for key, (x, base) in values.items() if base}
    return {"name": c.name, **p, "run": asdict(c.run), "ratios": ratios}


# ------------------------------------------------------------------ diff


def changes_table(before: str, after: str, changes: list[Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column(f"[cyan]{before}[/cyan]", overflow="fold", ratio=1)
    table.add_column("")
    table.add_column(f"[cyan]{after}[/cyan]", overflow="fold", ratio=1)
    for change in changes:
        table.add_row(change.what, change.before, "->", change.after)
    return table
