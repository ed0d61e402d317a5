"""`oneblock train`: begin a run, or resume one."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from os.path import abspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneblock.errors import OneblockError
from oneblock.train.options import Train, flatten, with_changes

if TYPE_CHECKING:
    from oneblock.parallel.world import World
    from oneblock.train.preflight import Estimate
    from oneblock.train.prepare import Job

# Options that may change on resume: how long to train and what to watch, not what is learned from what
FREE = ("steps", "seconds", "device", "nonfinite", "preflight", "dry_run", *Train().watch.__dataclass_fields__)
# Options that say how to start or resume; they are not settings of the run
CONTROL = ("resume", "config", "allow_changes")
# Options that decide the names and shapes of the tensors
SHAPES = ("tokenizer", "vocab", "model", "init", *Train().sizes.__dataclass_fields__)


def train(options: Train, typed: Collection[str] | None = None) -> None:
    """Train a model on text, with all ranks that torchrun started, or resume a run.

    `typed` are the names of the fields that the user set. Default: those that differ from their default values.
    """
    from oneblock.kernels.huge_pages import reuse_memory
    from oneblock.parallel.world import init_world

    loop = (options if options.resume is None else resumed_options(options, typed)).loop
    if not loop.device.startswith("cuda"):
        reuse_memory()
    with init_world(loop.mesh, loop.device) as world:
        if options.resume is None:
            begin(options, world)
        else:
            resume(options, options.resume, typed, world)


def begin(options: Train, world: World) -> None:
    """Start a new run. Every check comes before its folder exists."""
    from oneblock.train.build import build_state, compiles
    from oneblock.train.preflight import estimate
    from oneblock.train.prepare import prepare
    from oneblock.train.run import lock_run, new_folder, record

    job = prepare(options)
    options = with_changes(options, {"compile": "on" if compiles(job.spec, options.loop, job.context) else "off"})
    if options.init is not None:
        options = replace(options, model=options.init)
    plan = estimate(job, options, world)
    if world.is_main:
        print(summary(job, options, plan))
    if options.dry_run:
        print_verdict(job, options, plan, world)
        return
    check_run(job, options, plan, world)
    if options.out is None and world.size > 1:
        raise OneblockError(f"a run on {world.size} ranks needs --out FOLDER, the same on all of them")
    state, run = build_state(job, options, world), options.out
    if world.is_main:
        run = new_folder(options.out)
    assert run is not None
    with lock_run(run) if world.is_main else nullcontext():
        if world.is_main:
            record(run, options)
        world.barrier()
        run_trainer(job, options, run, state, plan, world)


def resume(options: Train, run: Path, typed: Collection[str] | None, world: World) -> None:
    """Continue a run from its newest undamaged checkpoint, with the same results as if it had not stopped."""
    from oneblock.train.run import lock_run

    options = resumed_options(options, typed, verbose=world.is_main)
    with lock_run(run) if world.is_main and not options.dry_run else nullcontext():
        world.barrier()
        resume_locked(options, run, world)


def resume_locked(options: Train, run: Path, world: World) -> None:
    from oneblock.train import checkpoint
    from oneblock.train.build import build_state
    from oneblock.train.preflight import estimate
    from oneblock.train.prepare import prepare
    from oneblock.train.run import record

    def warn(line: str) -> None:
        if world.is_main:
            print(f"warning: {line}", file=sys.stderr)

    folder = checkpoint.newest(run, warn)
    job = prepare(options, folder)
    plan = estimate(job, options, world)
    if options.dry_run:
        if world.is_main:
            print(f"from    {folder}\n{summary(job, options, plan)}")
        print_verdict(job, options, plan, world)
        return
    check_run(job, options, plan, world)
    state = build_state(job, options, world)
    progress = checkpoint.restore(folder, state)
    if progress.data != job.fingerprint and not options.allow_changes:
        raise OneblockError(f"the text has changed since {run} began: restore it, or start a new run from {folder}")
    if world.is_main:
        print(f"resuming {run} at step {progress.step:,}")
        record(run, options)
    run_trainer(job, options, run, state, plan, world)


def print_verdict(job: Job, options: Train, plan: Estimate, world: World) -> None:
    """Print the last line of a dry run: whether the run fits."""
    from oneblock.train.preflight import find_shortage

    if world.is_main:
        print(f"check   {find_shortage(job, options, plan, world) or 'it fits'}")


def check_run(job: Job, options: Train, plan: Estimate, world: World) -> None:
    """Raise OneblockError for a mesh that does not divide the model, and for a run that does not fit the machine."""
    from oneblock.train import preflight

    preflight.check_mesh(job.spec, job.context, options, world.mesh)
    preflight.check_run(job, options, plan, world)


def run_trainer(job: Job, options: Train, run: Path, state: Any, plan: Estimate, world: World) -> None:
    """Train to the end or to a stop signal, and print how to continue."""
    from rich.console import Console

    from oneblock.train.progress import ProgressDisplay
    from oneblock.train.trainer import Trainer

    show = ProgressDisplay(options.loop, None if world.is_main else Console(quiet=True))
    finished = Trainer(job, options, run, state, show, plan, world).go()
    if not finished:
        if world.is_main:
            print(
                f"stopped at step {state.step:,} and saved; resume with: oneblock train --resume {run}", file=sys.stderr
            )
        raise SystemExit(130)
    if world.is_main:
        print(f"report:   {run}/report.md\ngenerate: oneblock generate {run}/latest --prompt '...'")


# ------------------------------------------------------------------ options of a resumed run


def resumed_options(options: Train, typed: Collection[str] | None = None, verbose: bool = False) -> Train:
    """The recorded options of the run with the typed ones applied."""
    from oneblock.train.run import recorded

    assert options.resume is not None
    if not options.resume.is_dir():
        raise OneblockError(f"{options.resume}: no such run; --resume takes the folder of one")
    return merge_options(recorded(options.resume), options, typed, verbose)


def merge_options(recorded: Train, given: Train, typed: Collection[str] | None = None, verbose: bool = False) -> Train:
    """Apply every typed option to the recorded ones; one that changes what is learned needs --allow-changes."""
    was, now, default = flatten(recorded), flatten(given), flatten(Train())
    names = [key for key in now if (now[key] != default[key] if typed is None else key in typed)]
    changes = {key: now[key] for key in names if key not in CONTROL and absolute(now[key]) != absolute(was[key])}
    changed = [key for key in changes if key not in FREE]
    for key in changed if verbose else ():
        print(f"changed: {flag(key)} was {format_value(was[key])}, is now {format_value(now[key])}")
    if changed and not given.allow_changes:
        flags = ", ".join(map(flag, changed))
        raise OneblockError(
            f"a resumed run keeps its settings ({flags} differ): leave them out, or add --allow-changes"
        )
    if fixed := [key for key in changed if key in SHAPES]:
        raise OneblockError(f"{flag(fixed[0])} cannot change in a resumed run: start a new one")
    return with_changes(recorded, {**changes, "allow_changes": given.allow_changes})


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def absolute(value: Any) -> Any:
    """The value with paths in a tuple made absolute, since `config.toml` records them so."""
    return tuple(abspath(x) if isinstance(x, Path) else x for x in value) if isinstance(value, tuple) else value


def format_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ------------------------------------------------------------------ summary


def summary(job: Job, options: Train, plan: Estimate | None = None) -> str:
    """The model, the data, the length of the run and its cost, a line each."""
    from oneblock.plan import params
    from oneblock.train.preflight import estimate

    loop, spec = options.loop, job.spec
    plan = plan or estimate(job, options)
    tokens, sequences = round(plan.run.tokens), loop.batch_size * loop.gradient_accumulation_steps
    length = f"{loop.steps:,} steps of" if loop.seconds is None else f"{loop.seconds:,.0f} seconds of steps of"
    total = f" = {tokens:,} tokens, {tokens / job.tokens:.1f} epochs" if loop.seconds is None else ""
    total += ", compiled" if loop.compile == "on" else ""
    val = f"{len(job.val):,} for validation" if job.val is not None else "none for validation"
    weights = f", weights from {options.init}" if options.init is not None else ""
    return (
        f"model   {options.model}, {params.total(spec):,} parameters, {spec.n_layers} layers of {spec.dim}{weights}\n"
        f"text    {job.tokens:,} tokens to train on, {val}, vocabulary {job.tokenizer.vocab_size:,}\n"
        f"run     {length} {sequences} x {job.context} tokens{total}\n{plan.lines(loop)}"
    )
