"""`oneblock models`, `oneblock compare` and `oneblock diff`."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from oneblock.errors import OneblockError
from oneblock.lineage import table
from oneblock.plan import Plan, Run, plan, train_run
from oneblock.plan import describe as plain
from oneblock.spec import FAMILIES, MODELS, Spec, spec


@dataclass(frozen=True)
class Models:
    family: str | None = None  # only this family's: llama, gemma3, ..
    json: bool = False  # print rows as JSON


@dataclass(frozen=True)
class Compare:
    names: Positional[tuple[str, ...]]  # models, families, or config.json files (or their folders)
    context: int = 8192  # tokens in each text
    batch: int = 1  # texts at once
    dtype: str = "bfloat16"  # of the weights: float32, bfloat16, float16, float8, int8, int4
    image: int = 0  # tokens of an image, for models that look at one
    tokens: float | None = None  # to train on; without it: 20 for each parameter
    gpu: str = "h100"  # t4, l4, rtx-4090, l40s, a100, h100, h200, b200, mi300x
    gpus: int = 8
    utilisation: float = 0.4  # share of the GPUs' peak that training reaches
    price: float | None = None  # dollars per GPU and hour; without it: a rough market price
    json: bool = False  # print rows as JSON
    plot: Path | None = None  # write a picture here


@dataclass(frozen=True)
class Diff:
    before: Positional[str]  # a model, a family, or a config.json file (or its folder)
    after: Positional[str]
    json: bool = False  # print changes as JSON


@dataclass(frozen=True)
class Costs:
    """One column of a comparison."""

    name: str
    spec: Spec
    plan: Plan
    run: Run


def spec_of(name_or_path: str) -> Spec:
    """The Spec of a model or family by name, or of a Hugging Face config.json (or the folder that holds it)."""
    path = Path(name_or_path)
    named = name_or_path.lower() in MODELS or name_or_path.lower().replace("-", "_") in FAMILIES
    if named or not (path.exists() or path.suffix == ".json" or len(path.parts) > 1):
        return spec(name_or_path)
    if not path.exists():
        raise OneblockError(f"no file or folder {name_or_path!r}: give a config.json, its folder, or a model's name")
    from oneblock.store.config import read_config

    return read_config(path)[0]


def models(options: Models) -> None:
    """The lineage, with exact parameter counts."""
    chosen = [m for m in MODELS.values() if options.family in (None, m.family)]
    if not chosen:
        families = ", ".join(dict.fromkeys(m.family for m in MODELS.values()))
        raise OneblockError(f"no models of family {options.family!r}: choose from {families}")
    rows = [table.model_row(m, spec(m.name)) for m in chosen]
    if options.json:
        print(jsonlib.dumps(rows, indent=1))
    else:
        console = screen()
        console.print(table.models(rows, console.width))


def compare(options: Compare) -> None:
    """Parameters, KV cache, FLOPs, memory, time and money, side by side."""
    if not options.names:
        raise OneblockError("give at least one model: oneblock compare gpt2 llama-3-8b (oneblock models lists them)")
    costs = [cost(name, options) for name in options.names]
    if options.plot:
        from oneblock.lineage.plot import draw

        draw(costs, options.plot)
    if options.json:
        print(jsonlib.dumps([table.json_row(c, costs[0]) for c in costs], indent=1))
    else:
        console = screen()
        where = f"{options.gpus} x {options.gpu.upper()}"
        for each in table.comparisons(costs, where, options.utilisation, console.width):
            console.print(each)
        for note in notes(costs, options):
            console.print(f"[dim]{note}[/dim]")


def cost(name: str, options: Compare) -> Costs:
    model = spec_of(name)
    run = train_run(
        model,
        options.context,
        options.tokens,
        options.gpu,
        options.gpus,
        options.utilisation,
        options.price,
    )
    return Costs(label(name), model, plan(model, options.context, options.batch, options.dtype, options.image), run)


def label(name_or_path: str) -> str:
    """What stands above a column: a path's last telling part."""
    path = Path(name_or_path)
    return path.resolve().parent.name if path.name == "config.json" else path.name or path.resolve().name


def notes(costs: list[Costs], options: Compare) -> list[str]:
    """What the figures do not say by themselves."""
    found = [
        f"{c.name} was made for {c.spec.context:,} tokens: its figures at {options.context:,} are what it would cost"
        for c in costs
        if options.context > c.spec.context
    ]
    if not options.image and any(x.attn.cross for c in costs for x in c.spec.layers):
        found.append("without an image, layers that look at one cost nothing: --image 6404 is four tiles of 560 pixels")
    if options.plot:
        found.append(f"drawn in {options.plot}")
    return found


def diff(options: Diff) -> None:
    """What changed from one architecture to another, in words."""
    before, after = spec_of(options.before), spec_of(options.after)
    changes = plain.diff(before, after)
    if options.json:
        print(jsonlib.dumps([asdict(c) for c in changes], indent=1))
    elif changes:
        screen().print(table.changes(label(options.before), label(options.after), changes))
    else:
        print(f"{options.before} and {options.after} have the same architecture")


def screen() -> Console:
    """The terminal; a pipe has no width, so there nothing is cut short."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, table.WIDTH))
