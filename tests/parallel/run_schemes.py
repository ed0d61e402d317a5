"""One rank of test_training: train a tiny model for a few steps under each mesh; rank 0 writes the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from tasks import ValueHeadTask

from oneblock.data.batch_shards import deal_batches
from oneblock.data.loader import BatchLoader
from oneblock.data.packed import PackedDataset, sequential_batches
from oneblock.data.tokens import Tokens
from oneblock.model import Decoder, init_weights
from oneblock.parallel.mesh import parse_mesh
from oneblock.parallel.parallelize import parallelize_submodules, reshard
from oneblock.parallel.world import World
from oneblock.spec import get_spec
from oneblock.text.train import byte_level
from oneblock.train.build import transform_model
from oneblock.train.checkpoint import Saver, full_tensor, newest, restore
from oneblock.train.load_balancing import Routing
from oneblock.train.loop import Metrics, State, start, train
from oneblock.train.machine import precision
from oneblock.train.options import Loop, Objective, Optimizer, Schedule
from oneblock.train.task import Pretraining, evaluate

TEXT = Tokens([np.random.default_rng(0).integers(0, 64, 3000).astype(np.uint16)])
LOOP = Loop(steps=10, batch_size=8, gradient_accumulation_steps=2, dtype="float32")
# With a large eps a step is proportional to the gradient, so that weights can be compared
OPTIMIZER = Optimizer(lr=1e-2, max_grad_norm=0.5, eps=1e-3)
SIZES = {"vocab": 256, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "context": 32}


def build_state(world: World, family: str, seed: int = 0) -> State:
    family, _, task = family.partition("+")
    sizes: dict[str, Any] = {key: value for key, value in SIZES.items() if (family, key) != ("gpt2", "n_kv_heads")}
    if family == "mllama":
        sizes["cross"] = (False, True)  # the cross-attention layer is skipped, as without images
    model = Decoder(get_spec(family, **sizes))
    init_weights(model, seed)
    batches = BatchLoader(PackedDataset(TEXT, 32, LOOP.batch_size, 0), world.data_rank, world.data_ranks)
    if task == "value":
        value_task = ValueHeadTask(model, batches, seed)
        model = transform_model(model, LOOP, world)
        parallelize_submodules(value_task, world)
        return start(model, OPTIMIZER, value_task)
    model = transform_model(model, LOOP, world)
    objective, has_experts = Objective(load_balancing_weight=0.1), family == "mixtral"
    routing = Routing(model, objective, world.all_reduce_sum) if has_experts else None
    return start(model, OPTIMIZER, Pretraining(batches, routing=routing))


def run(world: World, family: str) -> tuple[State, list[list[float]]]:
    """Return the state after the last step, and the loss, gradient norm and tokens of every step."""
    state = build_state(world, family)
    rows: list[list[float]] = []

    def observe(state: State, metrics: Metrics) -> None:
        rows.append([metrics.loss.item(), metrics.grad_norm.item(), metrics.tokens])

    train(state, LOOP, OPTIMIZER, Schedule(warmup=2, schedule="wsd"), observe, world)
    return state, rows


def validation_loss(world: World, state: State) -> float:
    """Return the loss on a text whose last batches are fewer than the ranks and whose last row is short."""
    batches = deal_batches(sequential_batches(Tokens([TEXT.read(0, 32 * 2 * 4 + 18)]), 32, 2), world)
    loss = evaluate(state.model, batches, precision(LOOP), total=world.all_reduce_sum)
    reshard(state.model)
    return loss


def full_weights(state: State) -> dict[str, torch.Tensor]:
    return {name: full_tensor(p, True).contiguous() for name, p in state.named_parameters()}


def main(folder: Path, schemes: list[list[str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for mesh, family in schemes:
        world = World(rank, parse_mesh(mesh, size))
        state, rows = run(world, family)
        val = validation_loss(world, state)
        out = folder / f"{mesh} {family}"
        saver = Saver(out, byte_level(), "text", 2, background=True)
        saver.save(state)
        saver.wait()
        other = build_state(world, family, seed=1)
        restore(newest(out), other)
        weights, restored = full_weights(state), full_weights(other)
        assert all(torch.equal(weights[name], restored[name]) for name in weights), f"{mesh}: restored != saved"
        if rank == 0:
            save_file(weights, out / "weights.safetensors")
            (out / "metrics.json").write_text(json.dumps({"steps": rows, "val": val}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
