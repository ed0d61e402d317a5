"""TinyShakespeare by characters on a CPU: seconds of training until the validation loss is 1.88 or less.

The setting is nanoGPT's for small machines: 4 layers of 128 with 4 heads, texts of 64 characters, no dropout. Its side
is its block, loss, optimizer and schedule written anew (2000 steps of 12 texts, fp32, eager: its CPU default; its
README says 1.88), ours a Llama block of no more parameters through `oneblock.train`. The loss is the mean over the
whole validation split, the last tenth of the text. Validation is not timed, on either side.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import alternate, arguments, report, row, seconds
from oneblock.data.rows import in_order
from oneblock.train.loop import train
from oneblock.train.losses import evaluate, next_token
from oneblock.train.machine import precision
from oneblock.train.options import Loop, Optimizer, Schedule, Sizes, Train
from oneblock.train.prepare import Job, prepare
from oneblock.train.session import fresh

GOAL = 1.88
DATA = Path(os.environ.get("ONEBLOCK_DATA") or Path(__file__).parents[2] / "shared" / "data")
TEXT = DATA / "text" / "tinyshakespeare.txt"
CONTEXT, STEPS, BATCH = 64, 2000, 12  # nanoGPT's


def ours_setting() -> Train:
    """Less than half the tokens of the peer's run: bf16 products, a higher rate, rows that do not repeat."""
    return Train(
        data=(TEXT,),
        tokenizer="chars",
        model="llama",
        context=CONTEXT,
        sizes=Sizes(dim=128, n_layers=4, n_heads=4, hidden=340),
        loop=Loop(steps=320, batch=32, seed=1337),
        optimizer=Optimizer(lr=4e-3, beta2=0.95),
        schedule=Schedule(warmup=30),
    )


def run_ours(job: Job, options: Train) -> tuple[float, float]:
    """Seconds of training, and the validation loss after it."""
    state = fresh(job, options)
    loop = options.loop

    rows = job.rows(loop)
    took = seconds(lambda: train(state, rows.batch, next_token, loop, options.optimizer, options.schedule))
    assert job.val is not None
    return took, evaluate(state.model, in_order(job.val, CONTEXT, 64), precision(loop))


# ------------------------------------------------------------------ the peer


class PeerBlock(nn.Module):
    """GPT-2's block as nanoGPT has it: fused q, k, v; exact GELU; no biases."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).split(x.shape[-1], 2)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Peer(nn.Module):
    def __init__(self, vocab: int, dim: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.embed, self.places = nn.Embedding(vocab, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.ModuleList(PeerBlock(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim, bias=False), nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def peer_rate(step: int) -> float:
    """Warm-up over 100 steps, then a cosine from 1e-3 to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4


def peer_train(model: Peer, ids: np.ndarray) -> None:
    groups = [[p for p in model.parameters() if (p.dim() > 1) is decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = peer_rate(step)
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,)).tolist()
        x, y = (torch.stack([torch.from_numpy(ids[i + d : i + d + CONTEXT]) for i in starts]) for d in (0, 1))
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def run_peer(job: Job) -> tuple[float, float]:
    torch.manual_seed(1337)
    model, ids = Peer(job.tokenizer.vocab_size), job.texts[0].take(np.array([0]), job.tokens)[0]
    with torch.enable_grad():
        took = seconds(lambda: peer_train(model, ids))
    assert job.val is not None
    parts = [(float(model(b.ids, b.targets)) * b.count, b.count) for b in in_order(job.val, CONTEXT, 64)]
    return took, sum(p[0] for p in parts) / sum(p[1] for p in parts)


def main() -> int:
    args = arguments(__doc__ or "", repeats=1).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not TEXT.exists():
        print(f"skipped: no {TEXT} (ONEBLOCK_DATA names the folder of real data)", file=sys.stderr)
        print("[]" if args.json else "", end="\n" if args.json else "")
        return 0
    options = ours_setting()
    job = prepare(options)
    losses: dict[str, float] = {}

    def timed(name: str, run: tuple[float, float]) -> float:
        losses[name] = run[1]
        return run[0]

    ours, peer = alternate(
        lambda: timed("ours", run_ours(job, options)), lambda: timed("peer", run_peer(job)), args.repeats, warmup=0
    )
    rows = [
        row("shakespeare-cpu/nanogpt", ours, peer, "s", lower_is_better=True),
        row("shakespeare-cpu-loss/nanogpt", losses["ours"], losses["peer"], "nats", lower_is_better=True),
    ]
    report(rows, args, "shakespeare")
    if losses["ours"] > GOAL:
        print(f"error: our loss is {losses['ours']:.4f}, over the goal of {GOAL}", file=sys.stderr)
    return int(losses["ours"] > GOAL)


if __name__ == "__main__":
    sys.exit(main())
