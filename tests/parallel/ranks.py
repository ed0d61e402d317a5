"""What each process of test_parallel runs: a few steps of a tiny model under each mesh, written to a file by rank 0."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from oneblock.data.loader import Loader
from oneblock.data.packed import PackedDataset, in_order
from oneblock.data.tokens import Tokens
from oneblock.model import Decoder, init_weights
from oneblock.parallel.mesh import parse_mesh
from oneblock.parallel.parallelize import apply, settle, wrap
from oneblock.parallel.world import World
from oneblock.spec import get_spec
from oneblock.text.train import byte_level
from oneblock.train.build import learner_for
from oneblock.train.checkpoint import Saver, newest, restore, whole
from oneblock.train.loop import Metrics, State, start, train
from oneblock.train.losses import evaluate
from oneblock.train.machine import precision
from oneblock.train.options import Loop, Objective, Optimizer, Schedule

TEXT = Tokens([np.random.default_rng(0).integers(0, 64, 3000).astype(np.uint16)])
LOOP = Loop(steps=10, batch_size=8, gradient_accumulation_steps=2, dtype="float32")
OPTIMIZER = Optimizer(
    lr=1e-2, max_grad_norm=0.5, eps=1e-3
)  # a step in proportion to the gradient, so that weights compare
SIZES = {"vocab": 256, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "context": 32}


def fresh(world: World, family: str, seed: int = 0) -> State:
    sizes = {key: value for key, value in SIZES.items() if (family, key) != ("gpt2", "n_kv_heads")}
    model = Decoder(get_spec(family, **sizes))
    init_weights(model, seed)
    apply(model, world)
    return start(model, OPTIMIZER)


def run(world: World, family: str, state: State | None = None, steps: int = 10) -> tuple[State, list[list[float]]]:
    """The state after the steps, and of each its loss, the norm of its gradient, and its tokens."""
    state = state or fresh(world, family)
    learner = wrap(learner_for(state.model, LOOP, Objective(load_balancing_weight=0.1), None, world), world)
    batches = Loader(PackedDataset(TEXT, 32, LOOP.batch_size, 0), world.data_rank, world.data_ranks)
    found: list[list[float]] = []

    def observe(state: State, metrics: Metrics) -> None:
        found.append([metrics.loss.item(), metrics.grad_norm.item(), metrics.tokens])

    loop = Loop(**{**vars(LOOP), "steps": steps})
    train(state, batches, learner, loop, OPTIMIZER, Schedule(warmup=2, schedule="wsd"), observe, world)
    return state, found


def held_out(world: World, state: State) -> float:
    """The loss on a text whose last batches are fewer than the ranks, and the last of them is short."""
    batches = world.share(in_order(Tokens([TEXT.run(0, 32 * 2 * 4 + 18)]), 32, 2))
    found = evaluate(state.model, batches, precision(LOOP), total=world.total)
    settle(state.model)
    return found


def weights(state: State) -> dict[str, torch.Tensor]:
    return {name: whole(p, True).contiguous() for name, p in state.model.named_parameters()}


def main(folder: Path, schemes: list[list[str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for mesh, family in schemes:
        world = World(rank, parse_mesh(mesh, size))
        state, found = run(world, family)
        val = held_out(world, state)
        out = folder / f"{mesh} {family}"
        saver = Saver(out, byte_level(), "text", 2, background=True)
        saver.save(state)
        saver.wait()
        other = fresh(world, family, seed=1)
        restore(newest(out), other)
        mine, back = weights(state), weights(other)
        assert all(torch.equal(mine[name], back[name]) for name in mine), f"{mesh}: restored is not saved"
        if rank == 0:
            save_file(mine, out / "weights.safetensors")
            (out / "metrics.json").write_text(json.dumps({"steps": found, "val": val}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
