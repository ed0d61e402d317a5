"""`report.md`: what was trained, on what, and what came out."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from oneblock.files import write_file
from oneblock.plan import params
from oneblock.train.options import Train
from oneblock.train.preflight import gpu_of, rate
from oneblock.train.progress import clock, lasting, size
from oneblock.train.run import CONFIG, CURVES, METRICS, PATHS, PICTURE, Results, results

if TYPE_CHECKING:
    from oneblock.train.trainer import Trainer

REPORT = "report.md"


def write(session: Trainer, sample: str | None) -> None:
    """`sample`: what the model writes at the end; None where the run was stopped before."""
    text = "\n".join(page(session, sample)) + "\n"
    write_file(session.run / REPORT, text)


def page(session: Trainer, sample: str | None) -> Iterator[str]:
    options, found = session.options, results(session.log.rows)
    yield f"# {session.run.resolve().name}: {options.model}, {params.total(session.job.spec):,} parameters"
    yield ""
    if sample is None:
        yield f"Stopped at step {session.state.step:,}; go on with `oneblock train --resume {session.run}`."
        yield ""
    yield from table("What came out", outcome(found, session.state.step))
    yield f"![loss]({PICTURE})"
    yield ""
    yield f"![loss over tokens and time, throughput, gradient, learning rate]({CURVES})"
    yield ""
    yield from table("What was trained", trained(session))
    yield from table("Settings that are not the defaults", ((f"`{k}`", f"`{v}`") for k, v in changed(options).items()))
    yield from table("What it took, and what was expected", took(session, found))
    if sample is not None:
        yield from ("## A sample", "", f"At temperature 0.8, after {options.watch.prompt!r}:", "", fenced(sample), "")
    yield from table("Files", files(session))


def table(title: str, rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    """A table without a head, or nothing where it would be empty."""
    lines = [f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows]
    if lines:
        yield from (f"## {title}", "", "| | |", "|---|---|", *lines, "")


# ------------------------------------------------------------------ what it says


def outcome(found: Results, step: int) -> Iterator[tuple[str, str]]:
    if found.val is not None:
        yield "Validation loss, at the end", f"**{found.val:.4f}** nats per token"
        yield "Validation loss, the best", f"{found.best:.4f} at step {found.best_step:,}"
    if found.val_ema is not None:
        yield "Validation loss of the averaged weights", f"{found.val_ema:.4f}"
    if found.loss is not None:
        yield "Training loss, at the end (smoothed)", f"{found.loss:.4f}"
    yield "Steps", f"{step:,}"


def trained(session: Trainer) -> Iterator[tuple[str, str]]:
    job, options = session.job, session.options
    spec = job.spec
    yield "Model", f"{options.model}: {spec.n_layers} layers of {spec.dim}, {params.total(spec):,} parameters"
    yield (
        "Rows",
        f"{options.loop.batch_size * options.loop.gradient_accumulation_steps} of {job.context:,} tokens in a step",
    )
    yield "Data", ", ".join(f"`{path}`" for path in options.data) or "none"
    yield "To learn from", f"{job.tokens:,} tokens, vocabulary {job.tokenizer.vocab_size:,}"
    if job.val is not None:
        yield "To validate on", f"{len(job.val):,} tokens"
    yield "Machine", machine(options)
    yield "torch", f"{torch.__version__}, Python {platform.python_version()}"


def took(session: Trainer, found: Results) -> Iterator[tuple[str, str]]:
    plan = session.plan
    yield "Tokens", f"{session.state.tokens:,} ({session.state.tokens / session.job.tokens:.2f} epochs)"
    yield "Time", f"{clock(found.seconds)}; expected {lasting(plan.run.seconds)} for the whole run"
    if found.speed is not None:
        yield "Throughput", f"{found.speed:,.0f} tokens per second (median)"
    if found.mfu is not None:
        kind = str(plan.dtype).removeprefix("torch.")
        yield "MFU", f"{found.mfu:.1%} of the {rate(plan.peak)} measured here for {kind} products"
    if found.memory is not None:
        before = f" and {size(plan.base)} before it began" if plan.base else ""
        yield "Memory, the most", f"{size(found.memory)}; expected {size(plan.memory.total)} for training{before}"
    if plan.gpu is not None:
        price = f"{plan.devices} x {plan.gpu.name.upper()} at ${plan.gpu.price:.2f} an hour"
        yield "Cost", f"${found.seconds / 3600 * plan.devices * plan.gpu.price:.2f}: {price}"


def machine(options: Train) -> str:
    device = torch.device(options.loop.device)
    if device.type == "cuda":
        known = gpu_of(device)
        return torch.cuda.get_device_name(device) + (f" ({known.name})" if known else "")
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}"


def files(session: Trainer) -> Iterator[tuple[str, str]]:
    run = session.run
    for name, words in (
        ("latest", "the newest checkpoint: a Hugging Face folder, to chat with or go on from"),
        ("ema", "the averaged model"),
        (METRICS, "every measurement"),
        ("tensorboard", f"the same: `tensorboard --logdir {run}`"),
        ("nonfinite.jsonl", "steps that were no number"),
        (CONFIG, "every setting"),
    ):
        if (run / name).exists():
            yield f"[{name}]({name})", words


def changed(options: Any) -> dict[str, Any]:
    """The settings that are not their class's defaults, paths left out."""
    found: dict[str, Any] = {}
    default = type(options)()
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            found |= changed(value)
        elif value != getattr(default, f.name) and f.name not in PATHS:
            found[f.name] = value
    return found


def fenced(text: str) -> str:
    """In a block that the text itself cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
