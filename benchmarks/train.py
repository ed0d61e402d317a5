"""Training steps beside nanoGPT's, beside the machine's own matrix product, and the memory of the loss.

124m-step/nanogpt-fp32, -bf16   tokens/s of GPT-2 124M, 4 x 512 tokens a step, AdamW: ours (bf16 products) beside
                                nanoGPT's step as it is on CPUs (fp32) and with bf16 autocast added
124m-step/matmul-bf16           our step's FLOP/s (plan.flops.train) beside a 4096 x 4096 bf16 product's
loss-memory/naive               peak memory of a step with 128,256 words, 2 x 1024 tokens: ours beside the loss that
                                writes its logits out

Each side is a process of its own that waits for its turn, so that what one does to its memory does not help the other.
The peer is a faithful model of nanoGPT's block, loss and optimizer (peers.py), with nanoGPT's vocabulary of 50,304.
`shakespeare-cpu/nanogpt` is shakespeare.py's; --no-shakespeare leaves it out.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import BooleanOptionalAction
from collections.abc import Callable

import torch

import peers
import shakespeare
from common import Row, Side, answer, arguments, report, row, seconds

BATCH, CONTEXT = 4, 512
SIDES = ("ours", "fp32", "bf16")
WORDS, ROWS, LENGTH = 128_256, 2, 1024  # of the loss's memory


def ours(model_name: str = "gpt2", batch: int = BATCH, context: int = CONTEXT, **changes: int) -> Callable[[], None]:
    """A step as `oneblock train` makes it."""
    from oneblock.data.packed import Batch
    from oneblock.kernels.heap import reuse_memory
    from oneblock.model import Decoder, init_weights
    from oneblock.parallel.world import World
    from oneblock.spec import get_spec
    from oneblock.train.loop import ModelWithLoss, TrainStep, start
    from oneblock.train.losses import pretraining
    from oneblock.train.options import Loop, Optimizer, Schedule

    reuse_memory()
    model = Decoder(get_spec(model_name, **changes))
    init_weights(model, 0)
    state = start(model, Optimizer())
    ids = torch.randint(model.spec.vocab, (batch, context + 1))
    data = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), batch * context)
    engine = TrainStep(ModelWithLoss(model, pretraining), lambda n: data, Loop(), Optimizer(), Schedule(), World())
    return lambda: (engine.update(state), None)[1]


def nanogpt(
    bf16: bool, vocab: int = 50_304, layers: int = 12, batch: int = BATCH, context: int = CONTEXT
) -> Callable[[], None]:
    model = peers.NanoGpt(vocab, 768, layers, 12, 1024)
    optimizer = model.optimizer(6e-4, (0.9, 0.95))
    ids = torch.randint(vocab, (batch, context + 1))
    return lambda: peers.step(model, optimizer, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), bf16)


# ------------------------------------------------------------------ a side is a process


def serve(name: str) -> None:
    run = ours() if name == "ours" else nanogpt(name == "bf16")
    answer(lambda: seconds(run))


def product() -> float:
    """FLOP/s of a large bf16 product: the best of three."""
    from oneblock.train.machine import peak_flops

    return peak_flops(torch.device("cpu"), torch.bfloat16, 4096)


def steps(repeats: int, threads: int) -> list[Row]:
    from oneblock.plan import flops
    from oneblock.spec import get_spec

    sides = {name: Side(["--side", name, "--threads", str(threads)]) for name in SIDES}
    took: dict[str, list[float]] = {name: [] for name in SIDES}
    rates = []
    for i in range(repeats + 1):
        rates.append(product())
        for name in SIDES if i % 2 == 0 else reversed(SIDES):
            took[name].append(sides[name].ask())
    for side in sides.values():
        side.close()
    speed = {name: BATCH * CONTEXT / middle(found[1:]) for name, found in took.items()}  # the first is a warm-up
    work = flops.train(get_spec("gpt2"), CONTEXT)
    return [
        row("124m-step/nanogpt-fp32", speed["ours"], speed["fp32"], "tokens/s"),
        row("124m-step/nanogpt-bf16", speed["ours"], speed["bf16"], "tokens/s"),
        row("124m-step/matmul-bf16", speed["ours"] * work / 1e9, middle(rates) / 1e9, "GFLOP/s"),
    ]


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


# ------------------------------------------------------------------ memory


def peak(name: str) -> None:
    """Bytes that two steps needed beyond what the process had before."""
    import resource

    def held() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = held()
    small = {"vocab": WORDS, "n_layers": 2}
    run = ours("gpt2", ROWS, LENGTH, **small) if name == "ours" else nanogpt(True, WORDS, 2, ROWS, LENGTH)
    run()
    run()
    print(held() - before)


def loss_memory() -> Row:
    """Of two blocks and a vocabulary, where the loss is most of a step."""

    def of(name: str) -> float:
        return float(subprocess.check_output([sys.executable, __file__, "--peak", name], text=True)) / 1e9

    return row("loss-memory/naive", of("ours"), of("naive"), "GB", lower_is_better=True)


def main() -> int:
    parser = arguments(__doc__ or "", repeats=5)
    parser.add_argument("--shakespeare", action=BooleanOptionalAction, default=True, help="run shakespeare.py as well")
    shakespeare.flags(parser)
    parser.add_argument("--side", choices=SIDES, help="be one side: used by the script itself")
    parser.add_argument("--peak", choices=("ours", "naive"), help="one side's memory: used by the script itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.side:
        serve(args.side)
        return 0
    if args.peak:
        peak(args.peak)
        return 0
    rows = [*steps(args.repeats, args.threads), loss_memory()]
    if args.shakespeare:
        args.repeats = 1  # nanoGPT's side takes more than a minute
        rows += shakespeare.rows(args)
    report(rows, args, "train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
