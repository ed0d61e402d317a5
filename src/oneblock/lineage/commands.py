"""`oneblock models`, `oneblock compare` and `oneblock diff`."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional

from oneblock.config import Range
from oneblock.errors import OneblockError
from oneblock.lineage import table
from oneblock.plan import describe, plan_model, train_run
from oneblock.spec import FAMILIES, MODELS, Spec, get_spec


@dataclass(frozen=True)
class Models:
    """List published models with exact parameter counts; a model with images shows its text decoder."""

    family: str | None = None  # only models of this family: llama, gemma3, ..
    json: bool = False  # print the rows as JSON


@dataclass(frozen=True)
class Compare:
    """Compare parameters, KV cache, FLOPs, memory and training cost of models side by side."""

    names: Positional[tuple[str, ...]]  # models, families, org/name on the hub, config.json files or their folders
    context: Annotated[int, Range(1, 1 << 30)] = 8192  # tokens of a sequence; 8k is 8,192
    batch_size: Annotated[int, Range(1, 1 << 20)] = 1  # sequences at once
    dtype: str = "bfloat16"  # weight dtype: float32, bfloat16, float16, float8, int8, int4
    image_tokens: Annotated[int, Range(0, 1 << 30)] = 0  # image tokens of a sequence, for cross-attention layers
    tokens: Annotated[float | None, Range(above=0, high=1e18)] = None  # training tokens; default 20 a parameter
    gpu: str = "h100"  # t4, l4, rtx-4090, l40s, a100, h100, h200, b200 or mi300x
    gpus: Annotated[int, Range(1, 10_000_000)] = 8  # GPUs of the training run
    mfu: Annotated[float, Range(above=0, high=1)] = 0.4  # share of the GPUs' peak FLOPs that training reaches
    price: Annotated[float | None, Range(0, 1e6)] = None  # dollars per GPU and hour; default a rough market price
    json: bool = False  # print the rows as JSON
    plot: Path | None = None  # write a picture to this file (png, svg or pdf)


@dataclass(frozen=True)
class Diff:
    """Describe how two architectures differ, part by part."""

    before: Positional[str]  # a model, a family, org/name on the hub, a config.json file or its folder
    after: Positional[str]  # the architecture to compare with it
    json: bool = False  # print the changes as JSON


def spec_of(name_or_path: str) -> Spec:
    """The Spec of a published model or family, or of a config.json on disk or on the hub."""
    from oneblock.store import read_config, resolve_architecture

    path = resolve_architecture(name_or_path)
    return get_spec(name_or_path) if path is None else read_config(path)[0]


def models(options: Models) -> None:
    """Print the published models."""
    chosen = [m for m in MODELS.values() if options.family in (None, m.family)]
    if not chosen:
        families = ", ".join(dict.fromkeys(m.family for m in MODELS.values()))
        raise OneblockError(f"no models of family {options.family!r}: choose from {families}")
    rows = [table.model_row(m, get_spec(m.name)) for m in chosen]
    if options.json:
        print(jsonlib.dumps(rows, indent=1))
    else:
        console = open_console()
        console.print(table.models_table(rows, console.width))


def compare(options: Compare) -> None:
    """Print parameters, KV cache, FLOPs, memory, time and cost side by side."""
    if not options.names:
        raise OneblockError("give at least one model: oneblock compare gpt2 llama-3-8b (oneblock models lists them)")
    costs = [compute_costs(name, options) for name in options.names]
    if options.plot:
        from oneblock.lineage.plot import draw

        draw(costs, options.plot)
    if options.json:
        print(jsonlib.dumps([table.json_row(c, costs[0]) for c in costs], indent=1))
    else:
        console = open_console()
        hardware = f"{options.gpus} x {options.gpu.upper()}"
        for each in table.comparison_tables(costs, hardware, options.mfu, console.width):
            console.print(each)
    for note in notes(costs, options):
        print(note, file=sys.stderr if options.json else sys.stdout)


def compute_costs(name: str, options: Compare) -> table.Costs:
    """The plan and the training run of one model."""
    model = spec_of(name)
    run = train_run(model, options.context, options.tokens, options.gpu, options.gpus, options.mfu, options.price)
    costs = plan_model(model, options.context, options.batch_size, options.dtype, options.image_tokens)
    return table.Costs(label(name), model, costs, run)


def label(name_or_path: str) -> str:
    """The heading of a column: a published name, or the name of a config's folder (`./gpt2` for a folder gpt2)."""
    from oneblock.store.hub import is_published

    path = Path(name_or_path)
    name = path.resolve().parent.name if path.name == "config.json" else path.name or path.resolve().name
    return name_or_path if is_published(name) else name


def notes(costs: list[table.Costs], options: Compare) -> list[str]:
    """Assumptions that the figures do not show."""
    lines = [
        f"{c.name} has a context of {c.spec.context:,} tokens: its figures at {options.context:,} are hypothetical"
        for c in costs
        if options.context > c.spec.context
    ]
    for c, name in zip(costs, options.names, strict=True):
        family = name.lower().replace("-", "_")
        if family in FAMILIES and name.lower() not in MODELS:
            sizes = ", ".join([m.name for m in MODELS.values() if m.family == family][:3])
            lines.append(
                f"{name} is a family at its small default size ({c.plan.params_total:,} parameters), not a published "
                f"model; published sizes: {sizes}, .. (oneblock models --family {family})"
            )
    if not options.image_tokens and any(x.attn.cross for c in costs for x in c.spec.layers):
        lines.append("without an image, cross-attention layers cost nothing: --image-tokens 6404 is one 4-tile picture")
    return [*lines, *([f"picture written to {options.plot}"] if options.plot else [])]


def diff(options: Diff) -> None:
    """Print how two architectures differ."""
    before, after = spec_of(options.before), spec_of(options.after)
    changes = describe.diff(before, after)
    if options.json:
        print(jsonlib.dumps([asdict(c) for c in changes], indent=1))
    elif changes:
        open_console().print(table.changes_table(label(options.before), label(options.after), changes))
    else:
        print(f"{options.before} and {options.after} have the same architecture")


def open_console() -> Console:
    """The terminal; a pipe has no width, so nothing is cut there."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, table.PIPE_WIDTH))
