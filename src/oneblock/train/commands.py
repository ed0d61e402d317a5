"""`oneblock train`."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneblock.errors import OneblockError
from oneblock.train.options import Train

if TYPE_CHECKING:
    from oneblock.train.prepare import Job

# What a resumed run may be told anew: how long to go on and what to look at, not what is learned from what.
FREE = ("steps", "seconds", "device", *(f for f in Train().watch.__dataclass_fields__))


def train(options: Train) -> None:
    """Train a model on text files, or go on with a run."""
    if options.resume is not None:
        resume(options)
        return
    from oneblock.train.prepare import prepare
    from oneblock.train.run import new_folder, record
    from oneblock.train.session import fresh

    job = prepare(options)
    print(summary(job, options))
    if options.dry_run:
        return
    state = fresh(job, options)
    run = new_folder(options.out)
    record(run, options)
    follow(job, options, run, state)


def resume(options: Train) -> None:
    """Go on from the newest checkpoint as if nothing had happened."""
    from oneblock.text import Tokenizer
    from oneblock.train import checkpoint
    from oneblock.train.prepare import prepare
    from oneblock.train.run import record, recorded
    from oneblock.train.session import fresh

    run = options.resume
    assert run is not None
    folder = checkpoint.latest(run)
    options = merged(recorded(run), options)
    job = prepare(options, Tokenizer.load(folder))
    state = fresh(job, options)
    at = checkpoint.restore(folder, state)
    if at.data != job.fingerprint:
        raise OneblockError(f"the text has changed since {run} began: put it back, or start a new run from {folder}")
    print(f"resuming {run} at step {at.step:,}")
    record(run, options)
    follow(job, options, run, state)


def follow(job: Job, options: Train, run: Path, state: Any) -> None:
    """Run the session and say how it ended."""
    from oneblock.train.session import Session
    from oneblock.train.show import Show

    session = Session(job, options, run, state, Show(options.loop))
    if not session.go():
        print(f"stopped at step {state.step:,} and saved; go on with: oneblock train --resume {run}", file=sys.stderr)
        raise SystemExit(130)
    print(f"the loss curve: {run}/loss.png\nwrite with it:  oneblock generate {run}/latest --prompt '...'")


# ------------------------------------------------------------------ options


def merged(recorded: Train, given: Train) -> Train:
    """The recorded settings with those given anew that may change; OneblockError on any other."""
    changes = {key: value for key, value in flat(given).items() if value != flat(Train())[key]}
    for key in changes:
        if key not in (*FREE, "resume", "config") and changes[key] != flat(recorded)[key]:
            raise OneblockError(
                f"a resumed run keeps its settings: --{key.replace('_', '-')} cannot be given with --resume"
            )
    return with_changes(recorded, {key: value for key, value in changes.items() if key in FREE})


def flat(options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(options):
        value = getattr(options, f.name)
        found |= flat(value) if is_dataclass(value) else {f.name: value}
    return found


def with_changes(options: Any, changes: dict[str, Any]) -> Any:
    new = {}
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            new[f.name] = with_changes(value, changes)
        elif f.name in changes:
            new[f.name] = changes[f.name]
    return replace(options, **new)


# ------------------------------------------------------------------ what it takes


def summary(job: Job, options: Train) -> str:
    """The model, the text, the run and its memory in a few lines."""
    from oneblock.plan import memory, params
    from oneblock.train.machine import has_bf16

    loop, spec = options.loop, job.spec
    dtype = (
        loop.dtype if loop.dtype != "auto" else ("bfloat16" if has_bf16(loop.device.partition(":")[0]) else "float32")
    )
    need = memory.training(spec, job.context, loop.batch, dtype)
    step = loop.batch * loop.accumulate * job.context
    total = loop.steps * step
    length = f"{loop.steps:,} steps of" if loop.seconds is None else f"{loop.seconds:,.0f} seconds of steps of"
    of = f" = {total:,} tokens, {total / len(job.train):.1f} epochs" if loop.seconds is None else ""
    held = f"{len(job.val):,} to validate on" if job.val is not None else "none to validate on"
    return (
        f"model   {options.model}, {params.total(spec):,} parameters, {spec.n_layers} layers of {spec.dim}\n"
        f"text    {len(job.train):,} tokens to learn from, {held}, vocabulary {job.tokenizer.vocab_size:,}\n"
        f"run     {length} {loop.batch * loop.accumulate} x {job.context} tokens{of}\n"
        f"memory  about {size(need.total)}: {size(need.states)} for weights, gradients, optimizer; products in {dtype}"
    )


def size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
