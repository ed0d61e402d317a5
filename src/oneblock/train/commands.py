"""`oneblock train`."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneblock.errors import OneblockError
from oneblock.train.options import Train

if TYPE_CHECKING:
    from oneblock.parallel.world import World
    from oneblock.train.preflight import Estimate
    from oneblock.train.prepare import Job

# What a resumed run may be told anew: how long to go on and what to look at, not what is learned from what.
FREE = (
    "steps",
    "seconds",
    "device",
    "nonfinite",
    "preflight",
    "dry_run",
    *(f for f in Train().watch.__dataclass_fields__),
)

# What decides about a model's tensors.
SHAPES = ("tokenizer", "vocab", "model", *Train().sizes.__dataclass_fields__)


def train(options: Train) -> None:
    """Train a model on text, alone or with the ranks that torchrun has started, or go on with a run."""
    from oneblock.kernels.heap import reuse_memory
    from oneblock.parallel.world import init_world

    loop = (options if options.resume is None else resumed(options)).loop
    if not loop.device.startswith("cuda"):
        reuse_memory()
    with init_world(loop.mesh, loop.device) as world:
        (begin if options.resume is None else resume)(options, world)


def begin(options: Train, world: World) -> None:
    """A new run: everything that can be wrong is told before it has a folder."""
    from oneblock.train.build import compiles
    from oneblock.train.preflight import estimate
    from oneblock.train.prepare import prepare
    from oneblock.train.run import new_folder, record
    from oneblock.train.trainer import fresh

    job = prepare(options)
    options = with_changes(options, {"compile": "on" if compiles(job.spec, options.loop, job.context) else "off"})
    found = estimate(job, options, world)
    if world.is_main:
        print(summary(job, options, found))
    if options.dry_run:
        judge(job, options, found, world)
        return
    refuse(job, options, found, world)
    if options.out is None and world.size > 1:
        raise OneblockError(f"{world.size} ranks need one folder: give --out FOLDER")
    state, run = fresh(job, options, world), options.out
    if world.is_main:
        run = new_folder(options.out)
        record(run, options)
    world.barrier()
    assert run is not None
    follow(job, options, run, state, found, world)


def resume(options: Train, world: World) -> None:
    """Go on from the newest whole checkpoint as if nothing had happened."""
    from oneblock.text import Tokenizer
    from oneblock.train import checkpoint
    from oneblock.train.preflight import estimate
    from oneblock.train.prepare import prepare
    from oneblock.train.run import record
    from oneblock.train.trainer import fresh

    run = options.resume
    assert run is not None

    def warn(line: str) -> None:
        if world.is_main:
            print(f"warning: {line}", file=sys.stderr)

    folder = checkpoint.newest(run, warn)
    options = resumed(options, told=world.is_main)
    job = prepare(options, Tokenizer.load(folder))
    found = estimate(job, options, world)
    if options.dry_run:
        if world.is_main:
            print(f"from    {folder}\n{summary(job, options, found)}")
        judge(job, options, found, world)
        return
    refuse(job, options, found, world)
    state = fresh(job, options, world)
    at = checkpoint.restore(folder, state)
    if at.data != job.fingerprint and not options.allow_changes:
        raise OneblockError(f"the text has changed since {run} began: put it back, or start a new run from {folder}")
    if world.is_main:
        print(f"resuming {run} at step {at.step:,}")
        record(run, options)
    follow(job, options, run, state, found, world)


def judge(job: Job, options: Train, found: Estimate, world: World) -> None:
    """The last line of a dry run: whether it would begin."""
    from oneblock.train.preflight import find_shortage

    if world.is_main:
        print(f"check   {find_shortage(job, options, found, world) or 'it fits'}")


def refuse(job: Job, options: Train, found: Estimate, world: World) -> None:
    """What cannot be shared among the ranks, or does not fit the machine."""
    from oneblock.train import preflight

    preflight.check_mesh(job.spec, job.context, options, world.mesh)
    preflight.check_run(job, options, found, world)


def follow(job: Job, options: Train, run: Path, state: Any, found: Estimate, world: World) -> None:
    """Run the session and say how it ended."""
    from rich.console import Console

    from oneblock.train.progress import ProgressDisplay
    from oneblock.train.trainer import Trainer

    show = ProgressDisplay(options.loop, None if world.is_main else Console(quiet=True))
    session = Trainer(job, options, run, state, show, found, world)
    finished = session.go()
    if not finished:
        if world.is_main:
            print(
                f"stopped at step {state.step:,} and saved; go on with: oneblock train --resume {run}", file=sys.stderr
            )
        raise SystemExit(130)
    if world.is_main:
        print(f"the report:    {run}/report.md\nwrite with it: oneblock generate {run}/latest --prompt '...'")


# ------------------------------------------------------------------ options


def resumed(options: Train, told: bool = False) -> Train:
    """The settings that a run was recorded with, and those given anew."""
    from oneblock.train.run import recorded

    assert options.resume is not None
    if not options.resume.is_dir():
        raise OneblockError(f"{options.resume}: no such run; --resume takes the folder of one")
    return merged(recorded(options.resume), options, told)


def merged(recorded: Train, given: Train, told: bool = True) -> Train:
    """The recorded settings with those given anew. What a run began with changes only if that is allowed."""
    was, now, usual = flat(recorded), flat(given), flat(Train())
    changes = {key: now[key] for key in now if now[key] != usual[key] and now[key] != was[key]}
    changed = [key for key in changes if key not in (*FREE, "resume", "config", "allow_changes")]
    for key in changed if told else ():
        print(f"changed: --{key.replace('_', '-')} was {shown(was[key])}, is now {shown(now[key])}")
    if changed and not given.allow_changes:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in changed)
        raise OneblockError(
            f"a resumed run keeps its settings ({flags} differ): leave them out, or add --allow-changes"
        )
    if fixed := [key for key in changed if key in SHAPES]:
        raise OneblockError(
            f"the checkpoint's model cannot take another --{fixed[0].replace('_', '-')}: start a new run"
        )
    return with_changes(recorded, {key: changes[key] for key in changes if key not in ("resume", "config")})


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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


def summary(job: Job, options: Train, found: Estimate | None = None) -> str:
    """The model, the text, the run and what it takes in a few lines."""
    from oneblock.plan import params
    from oneblock.train.preflight import estimate

    loop, spec = options.loop, job.spec
    found = found or estimate(job, options)
    total, rows = round(found.run.tokens), loop.batch_size * loop.gradient_accumulation_steps
    length = f"{loop.steps:,} steps of" if loop.seconds is None else f"{loop.seconds:,.0f} seconds of steps of"
    of = f" = {total:,} tokens, {total / job.tokens:.1f} epochs" if loop.seconds is None else ""
    of += ", compiled" if loop.compile == "on" else ""
    held = f"{len(job.val):,} to validate on" if job.val is not None else "none to validate on"
    return (
        f"model   {options.model}, {params.total(spec):,} parameters, {spec.n_layers} layers of {spec.dim}\n"
        f"text    {job.tokens:,} tokens to learn from, {held}, vocabulary {job.tokenizer.vocab_size:,}\n"
        f"run     {length} {rows} x {job.context} tokens{of}\n{found.lines(loop)}"
    )
