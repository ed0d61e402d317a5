"""Training throughput beside nanoGPT, beside the machine's matmul rate, and loss memory: `python benchmarks/train.py`.

124m-step/nanogpt-fp32, -bf16   tokens/s of GPT-2 124M, 4 x 512 tokens a step, AdamW: ours (bf16 matmuls) beside
                                nanoGPT's step as it is on CPUs (fp32) and with bf16 autocast added
124m-step/matmul-bf16           FLOP/s of our step (plan.flops.train) beside a 4096 x 4096 bf16 matmul
loss-memory/naive               peak memory of a step with vocabulary 128,256 and 2 x 1024 tokens: ours beside a loss
                                that materialises the logits

Each side is a process of its own that waits for its sample. The peer is a faithful model of nanoGPT's block, loss and
optimizer (peers.py), with nanoGPT's vocabulary of 50,304. `shakespeare-cpu/nanogpt` comes from shakespeare.py;
--no-shakespeare leaves it out. `--against CHECKOUT` compares with another commit instead: rows named `previous`.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import replace

import torch

import peers
import shakespeare
from common import Row, Worker, arguments, measure_pairs, pair_row, report, row, seconds, serve

BATCH, CONTEXT = 4, 512
PEERS = {"fp32": "nanogpt-fp32", "bf16": "nanogpt-bf16"}
VOCAB, ROWS, LENGTH = 128_256, 2, 1024  # of the loss's memory


def our_step(
    model_name: str = "gpt2", batch: int = BATCH, context: int = CONTEXT, **changes: int
) -> Callable[[], None]:
    """A step as `oneblock train` makes it."""
    from oneblock.data.packed import Batch
    from oneblock.kernels.huge_pages import reuse_memory
    from oneblock.model import Decoder, init_weights
    from oneblock.parallel.world import World
    from oneblock.spec import get_spec
    from oneblock.train.loop import ModelWithLoss, TrainStep, start
    from oneblock.train.options import Loop, Optimizer, Schedule
    from oneblock.train.task import Pretraining

    reuse_memory()
    model = Decoder(get_spec(model_name, **changes))
    init_weights(model, 0)
    ids = torch.randint(model.spec.vocab, (batch, context + 1))
    data = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), batch * context)
    state = start(model, Optimizer(), Pretraining(lambda n: data))
    engine = TrainStep(ModelWithLoss(model, state.task), Loop(), Optimizer(), Schedule(), World())
    return lambda: (engine.update(state), None)[1]


def nanogpt_step(
    bf16: bool, vocab: int = 50_304, layers: int = 12, batch: int = BATCH, context: int = CONTEXT
) -> Callable[[], None]:
    model = peers.NanoGpt(vocab, 768, layers, 12, 1024)
    optimizer = model.optimizer(6e-4, (0.9, 0.95))
    ids = torch.randint(vocab, (batch, context + 1))
    return lambda: peers.step(model, optimizer, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), bf16)


# ------------------------------------------------------------------ sides


def run_side(name: str) -> None:
    if name == "matmul":
        serve(matmul_rate)
        return
    step = our_step() if name == "ours" else nanogpt_step(name == "bf16")
    serve(lambda: BATCH * CONTEXT / seconds(step))


def matmul_rate() -> float:
    """FLOP/s of a 4096 x 4096 bf16 matmul: the best of three."""
    from oneblock.train.machine import peak_flops

    return peak_flops(torch.device("cpu"), torch.bfloat16, 4096)


def step_rows(args: Namespace) -> list[Row]:
    from oneblock.plan import flops
    from oneblock.spec import get_spec

    flags, rows = ["--threads", str(args.threads), "--side"], []
    per_token = flops.train(get_spec("gpt2"), CONTEXT)
    ours = Worker([*flags, "ours"])
    for name in ("previous",) if args.against else ("fp32", "bf16", "matmul"):
        peer = Worker([*flags, "ours" if args.against else name], args.against)
        pairs = measure_pairs(ours.ask, peer.ask, args.pairs)
        peer.close()
        if name == "matmul":
            pairs.ours = [replace(sample, value=sample.value * per_token / 1e9) for sample in pairs.ours]
            pairs.peer = [replace(sample, value=sample.value / 1e9) for sample in pairs.peer]
            rows.append(pair_row("124m-step/matmul-bf16", pairs, "GFLOP/s"))
        else:
            rows.append(pair_row(f"124m-step/{PEERS.get(name, name)}", pairs, "tokens/s"))
        print(rows[-1], file=sys.stderr)
    ours.close()
    return rows


# ------------------------------------------------------------------ memory


def print_peak(name: str) -> None:
    """Print the bytes by which two steps raise the peak memory of this process."""
    import resource

    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak_bytes()
    small = {"vocab": VOCAB, "n_layers": 2}
    run = our_step("gpt2", ROWS, LENGTH, **small) if name == "ours" else nanogpt_step(True, VOCAB, 2, ROWS, LENGTH)
    run()
    run()
    print(peak_bytes() - before)


def loss_memory() -> Row:
    """Peak memory of a two-layer model, where the loss dominates a step."""

    def peak_of(name: str) -> float:
        return float(subprocess.check_output([sys.executable, __file__, "--peak", name], text=True)) / 1e9

    return row("loss-memory/naive", peak_of("ours"), peak_of("naive"), "GB", lower_is_better=True)


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--shakespeare", action=BooleanOptionalAction, default=True, help="run shakespeare.py as well")
    shakespeare.add_flags(parser)
    parser.add_argument("--peak", choices=("ours", "naive"), help="one side's memory: used by the script itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.side:
        run_side(args.side)
        return 0
    if args.peak:
        print_peak(args.peak)
        return 0
    rows = step_rows(args)
    rows += [] if args.against else [loss_memory()]
    if args.shakespeare:
        args.pairs = 5  # nanoGPT's side takes more than a minute
        rows += shakespeare.measure(args)
    report(rows, args, "train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
