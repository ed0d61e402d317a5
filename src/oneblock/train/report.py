"""`report.md`: the results, the model, the settings and the cost of a run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from oneblock.files import write_file
from oneblock.plan import params
from oneblock.train.loop import State
from oneblock.train.options import Train
from oneblock.train.preflight import Estimate, find_gpu
from oneblock.train.prepare import Job
from oneblock.train.run import CONFIG, CURVES, METRICS, PATHS, PICTURE, Log, Results, results
from oneblock.units import format_bytes, format_clock, format_duration, format_scaled

REPORT = "report.md"
FILES = {
    "latest": "the newest checkpoint: a Hugging Face folder",
    "ema": "the EMA weights as a model folder",
    METRICS: "every measurement",
    "tensorboard": "the same for TensorBoard: `tensorboard --logdir {run}`",
    "nonfinite.jsonl": "steps with a NaN or Inf loss or gradient",
    CONFIG: "every setting",
}
Row = tuple[str, str]


class ReportedRun(Protocol):
    """A training run as its report reads it; a `Trainer` is one."""

    run: Path
    job: Job
    options: Train
    plan: Estimate
    log: Log
    state: State


def write(trainer: ReportedRun, sample: str | None) -> None:
    """Write the report. `sample` is text generated at the end; None if the run was stopped before."""
    write_file(trainer.run / REPORT, "\n".join(render(trainer, sample)) + "\n")


def render(trainer: ReportedRun, sample: str | None) -> Iterator[str]:
    """The lines of the report."""
    options, metrics = trainer.options, results(trainer.log.rows)
    yield from (f"# {trainer.run.resolve().name}: {options.model}, {params.total(trainer.job.spec):,} parameters", "")
    if sample is None:
        stopped = f"Stopped at step {trainer.state.step:,}; continue with `oneblock train --resume {trainer.run}`."
        yield from (stopped, "")
    yield from table("Results", result_rows(metrics, trainer.state.step))
    yield from (f"![loss]({PICTURE})", "", f"![loss, throughput, gradient norm, learning rate]({CURVES})", "")
    yield from table("Model and data", model_rows(trainer))
    changed = [(f"`{name}`", f"`{value}`") for name, value in changed_settings(options).items()]
    yield from table("Settings that differ from the defaults", changed)
    yield from table("Cost, measured and expected", cost_rows(trainer, metrics))
    if sample is not None:
        prompt = f"Temperature 0.8, prompt {options.watch.prompt!r}:"
        yield from ("## Sample", "", prompt, "", fenced(sample), "")
    existing = [(name, text) for name, text in FILES.items() if (trainer.run / name).exists()]
    yield from table("Files", [(f"[{name}]({name})", text.format(run=trainer.run)) for name, text in existing])


def table(title: str, rows: list[Row]) -> Iterator[str]:
    """A Markdown table without a header row; nothing for no rows."""
    lines = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows]
    if lines:
        yield from (f"## {title}", "", "| | |", "|---|---|", *lines, "")


def result_rows(metrics: Results, step: int) -> list[Row]:
    rows = [("Steps", f"{step:,}")]
    if metrics.loss is not None:
        rows.append(("Training loss, at the end (smoothed)", f"{metrics.loss:.4f}"))
    if metrics.val is not None:
        rows.append(("Validation loss, at the end", f"**{metrics.val:.4f}** nats per token"))
        rows.append(("Validation loss, the best", f"{metrics.best:.4f} at step {metrics.best_step:,}"))
    if metrics.val_ema is not None:
        rows.append(("Validation loss of the EMA weights", f"{metrics.val_ema:.4f}"))
    return rows


def model_rows(trainer: ReportedRun) -> list[Row]:
    job, options, spec = trainer.job, trainer.options, trainer.job.spec
    sequences = options.loop.batch_size * options.loop.gradient_accumulation_steps
    validation = f"{len(job.val):,} tokens" if job.val is not None else "none"
    return [
        ("Model", f"{options.model}: {spec.n_layers} layers of dim {spec.dim}, {params.total(spec):,} parameters"),
        ("Step", f"{sequences} sequences of {job.context:,} tokens"),
        ("Data", ", ".join(f"`{path}`" for path in options.data) or "none"),
        ("Training data", f"{job.tokens:,} tokens, vocabulary {job.tokenizer.vocab_size:,}"),
        ("Validation data", validation),
        ("Machine", machine(options)),
        ("Versions", f"torch {torch.__version__}, Python {platform.python_version()}"),
    ]


def cost_rows(trainer: ReportedRun, metrics: Results) -> list[Row]:
    plan = trainer.plan
    epochs = trainer.state.tokens / trainer.job.tokens
    expected = format_duration(plan.run.seconds)
    rows = [
        ("Tokens", f"{trainer.state.tokens:,} ({epochs:.2f} epochs)"),
        ("Time", f"{format_clock(metrics.seconds)}; expected {expected} for the whole run"),
    ]
    if metrics.speed is not None:
        rows.append(("Throughput", f"{metrics.speed:,.0f} tokens per second (median)"))
    if metrics.mfu is not None:
        dtype = str(plan.dtype).removeprefix("torch.")
        peak = format_scaled(plan.peak, "FLOP/s")
        rows.append(("MFU", f"{metrics.mfu:.1%} of the {peak} measured for {dtype} matmuls"))
    if metrics.memory is not None:
        before = f" and {format_bytes(plan.base)} before it" if plan.base else ""
        planned = format_bytes(plan.memory.total)
        rows.append(("Peak memory", f"{format_bytes(metrics.memory)}; expected {planned} for training{before}"))
    if plan.gpu is not None:
        dollars = metrics.seconds / 3600 * plan.devices * plan.gpu.price
        rows.append(("Price", f"${dollars:.2f}: {plan.devices} x {plan.gpu.name.upper()}, ${plan.gpu.price:.2f}/hour"))
    return rows


def machine(options: Train) -> str:
    """The GPU, or the processor and its threads."""
    device = torch.device(options.loop.device)
    if device.type == "cuda":
        gpu = find_gpu(device)
        return torch.cuda.get_device_name(device) + (f" ({gpu.name})" if gpu else "")
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}"


def changed_settings(options: Any) -> dict[str, Any]:
    """The settings that differ from their class's defaults, without paths."""
    changed: dict[str, Any] = {}
    default = type(options)()
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            changed |= changed_settings(value)
        elif value != getattr(default, f.name) and f.name not in PATHS:
            changed[f.name] = value
    return changed


def fenced(text: str) -> str:
    """A Markdown code block whose fence does not occur in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
