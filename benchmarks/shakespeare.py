"""TinyShakespeare by characters on a CPU: seconds of training until the validation loss is 1.88 or less.

The setting is nanoGPT's for small machines: 4 layers of 128 with 4 heads, 64 characters of context, no dropout. The
peer is nanoGPT's block, loss, optimizer and schedule written anew (peers.py; 2000 steps of 12 sequences, fp32, eager:
its CPU default; its README reports 1.88). Ours is a Qwen 3 block with fewer parameters through `oneblock.train`: Muon,
zero-initialised residuals, bf16 matmuls, compiled. The loss is the mean over the whole validation split, the last tenth
of the text, and over the seeds. Validation and compilation (at the first steps, before the clock) are not timed.

`--large`: nanoGPT's setting for GPUs (6 layers of 384 with 6 heads, context 256), ours alone, for --minutes on this
machine, compilation and validation counted; nanoGPT's best loss is 1.4697, after 5000 steps of 64 sequences on an A100.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import peers
from common import Row, Worker, arguments, measure_pairs, pair_row, report, row, seconds, serve
from oneblock.data.packed import sequential_batches
from oneblock.kernels.huge_pages import reuse_memory
from oneblock.train.build import build_state
from oneblock.train.loop import Metrics, State, train
from oneblock.train.machine import precision
from oneblock.train.options import Dropouts, Loop, Optimizer, Schedule, Sizes, Start, Train
from oneblock.train.prepare import Job, prepare
from oneblock.train.task import evaluate

GOAL, LARGE_GOAL = 1.88, 1.4697
DATA = Path(os.environ.get("ONEBLOCK_DATA") or Path(__file__).parents[2] / "shared" / "data")
TEXT = DATA / "text" / "tinyshakespeare.txt"
CONTEXT, STEPS, BATCH = 64, 2000, 12  # nanoGPT's


def our_setting(compile: bool) -> Train:
    """An eighth of the tokens of the peer's run."""
    return Train(
        data=(TEXT,),
        tokenizer="chars",
        model="qwen3",
        context=CONTEXT,
        sizes=Sizes(dim=128, n_layers=4, n_heads=4, n_kv_heads=1, head_dim=32, hidden_dim=340),
        start=Start(zero_init_residual=True, embed_std=0.3),
        loop=Loop(steps=90, batch_size=32, seed=1337, compile="on" if compile else "off"),
        optimizer=Optimizer("muon", lr=3e-2, matrix_lr=2e-2, beta2=0.95, momentum=0.85),
        schedule=Schedule("wsd", warmup=4, decay=0.6),
    )


def large_setting(minutes: float) -> Train:
    return Train(
        data=(TEXT,),
        tokenizer="chars",
        model="qwen3",
        context=256,
        sizes=Sizes(dim=384, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=64, hidden_dim=1024),
        start=Start(zero_init_residual=True, embed_std=0.3),
        dropouts=Dropouts(embed_dropout=0.1, residual_dropout=0.1),
        loop=Loop(seconds=60 * minutes, batch_size=32, seed=1337, compile="on"),
        optimizer=Optimizer("muon", lr=3e-3, matrix_lr=1e-2, beta2=0.95),
        schedule=Schedule("wsd", warmup=10, decay=0.7),
    )


def run_large(options: Train) -> list[Row]:
    """The best of four losses over the last third of the run, and the minutes until it was reached."""
    if not TEXT.exists():
        return []
    job, began = prepare(options), time.perf_counter()
    state = build_state(job, options)
    assert options.loop.seconds is not None
    losses: list[tuple[float, float]] = []

    def observe(state: State, metrics: Metrics) -> None:
        share = metrics.seconds / (options.loop.seconds or 1)
        if share >= 0.7 + 0.1 * len(losses):
            with torch.compiler.set_stance("force_eager"):
                assert job.val is not None
                loss = evaluate(state.model, sequential_batches(job.val, 256, 32), precision(options.loop))
            losses.append((loss, (time.perf_counter() - began) / 60))
            print(f"{losses[-1][1]:.1f} minutes, {state.tokens:,} tokens: {loss:.4f}", file=sys.stderr)

    train(state, options.loop, options.optimizer, options.schedule, observe)
    loss, minutes = min(losses)
    return [
        row("shakespeare-gpu-loss/nanogpt", loss, LARGE_GOAL, "nats", lower_is_better=True),
        row("shakespeare-gpu-time/hour", minutes, 60.0, "minutes", lower_is_better=True),
    ]


def run_ours(job: Job, options: Train) -> tuple[float, float]:
    """Seconds of training, and the validation loss after it."""
    torch.compiler.reset() if options.loop.compile == "on" else None
    warm = replace(options.loop, steps=2)
    for loop in (warm, options.loop):  # compiled programs are made for a model's blocks, whichever weights they have
        state = build_state(job, replace(options, loop=loop))
        took = seconds(lambda: train(state, loop, options.optimizer, options.schedule))  # noqa: B023
    assert job.val is not None
    with torch.compiler.set_stance("force_eager"):
        return took, evaluate(state.model, sequential_batches(job.val, CONTEXT, 64), precision(options.loop))


# ------------------------------------------------------------------ the peer


def peer_rate(step: int) -> float:
    """Warm-up over 100 steps, then a cosine from 1e-3 to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4


def peer_train(model: peers.NanoGpt, ids: np.ndarray) -> None:
    optimizer = model.optimizer(1e-3, (0.9, 0.99))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = peer_rate(step)
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,)).tolist()
        x, y = (torch.stack([torch.from_numpy(ids[i + d : i + d + CONTEXT]) for i in starts]) for d in (0, 1))
        peers.step(model, optimizer, x, y, bf16=False)


@torch.no_grad()
def run_peer(job: Job) -> tuple[float, float]:
    torch.manual_seed(1337)
    model = peers.NanoGpt(job.tokenizer.vocab_size, 128, 4, 4, CONTEXT)
    ids = job.texts[0].read(0, job.tokens)
    with torch.enable_grad():
        took = seconds(lambda: peer_train(model, ids))
    assert job.val is not None
    parts = [(float(model(b.ids, b.targets)) * b.count, b.count) for b in sequential_batches(job.val, CONTEXT, 64)]
    return took, sum(p[0] for p in parts) / sum(p[1] for p in parts)


def run_side(side: str, args: Namespace) -> None:
    """A worker: seconds of one run; validation losses go to the file `--losses`."""
    reuse_memory()
    options = our_setting(args.compile)
    job, seeds = prepare(options), itertools.count(1337)

    def run() -> float:
        if side == "ours":
            took, loss = run_ours(job, replace(options, loop=replace(options.loop, seed=next(seeds))))
        else:
            took, loss = run_peer(job)
        with args.losses.open("a") as file:
            file.write(f"{loss}\n")
        return took

    serve(run)


def measure(args: Namespace) -> list[Row]:
    """Whole runs alternated with the peer's; the mean loss over at least `seeds` runs of ours."""
    if not TEXT.exists():
        print(f"skipped: no {TEXT} (ONEBLOCK_DATA names the folder of real data)", file=sys.stderr)
        return []
    name = "previous" if args.against else "nanogpt"
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / side for side in ("ours", name)}
        flags = ["--threads", str(args.threads), *(() if args.compile else ("--no-compile",))]
        workers = {
            side: Worker([*flags, "--side", "ours" if args.against else side, "--losses", str(file)], checkout)
            for (side, file), checkout in zip(files.items(), (None, args.against), strict=True)
        }
        pairs = measure_pairs(workers["ours"].ask, workers[name].ask, args.pairs, args.pairs, warmup=0)
        for _ in range(len(pairs.ours), args.seeds):
            workers["ours"].ask()
        for worker in workers.values():
            worker.close()
        means = {side: statistics.fmean(map(float, file.read_text().split())) for side, file in files.items()}
    return [
        pair_row(f"shakespeare-cpu/{name}", pairs, "s", lower_is_better=True),
        row(f"shakespeare-cpu-loss/{name}", means["ours"], means[name], "nats", lower_is_better=True),
    ]


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="least number of our runs whose losses are averaged")
    parser.add_argument("--compile", action=BooleanOptionalAction, default=True, help="compile our blocks, untimed")
    parser.add_argument("--losses", type=Path, help="where --side writes losses: used by the script itself")


def main() -> int:
    parser = arguments(__doc__ or "", pairs=5)
    add_flags(parser)
    parser.add_argument("--large", action="store_true", help="nanoGPT's setting for GPUs instead, ours alone")
    parser.add_argument("--minutes", type=float, default=50, help="length of --large")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.side:
        run_side(args.side, args)
        return 0
    if args.large:
        reuse_memory()
        results, goal, name = run_large(large_setting(args.minutes)), LARGE_GOAL, "shakespeare-gpu"
    else:
        results, goal, name = measure(args), GOAL, "shakespeare"
    report(results, args, name)
    loss = next((row["ours"] for row in results if row["unit"] == "nats"), 0.0)
    if loss > goal:
        print(f"error: our loss is {loss:.4f}, over the goal of {goal}", file=sys.stderr)
    return int(loss > goal)


if __name__ == "__main__":
    sys.exit(main())
