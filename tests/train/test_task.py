"""Tasks with modules of their own, with a reference model, and with batches from the current model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tasks import RolloutTask, ValueHeadTask

from oneblock.data.packed import PackedDataset
from oneblock.errors import OneblockError
from oneblock.model import Decoder, init_weights
from oneblock.parallel.mesh import Mesh
from oneblock.parallel.world import World
from oneblock.spec import get_spec
from oneblock.text.train import byte_level
from oneblock.train.checkpoint import Saver, optimizer_tensors, restore
from oneblock.train.loop import Metrics, State, start, train
from oneblock.train.options import Loop, Optimizer, Schedule
from oneblock.train.task import Task, next_token_loss

TEXT = np.tile(np.arange(13, dtype=np.uint16), 60)
ROWS = PackedDataset(TEXT, 12, 4, 0)


def value_head_task(model: Decoder, seed: int) -> Task:
    return ValueHeadTask(model, ROWS.batch, seed)


def rollout_task(model: Decoder, seed: int) -> Task:
    return RolloutTask()


MakeTask = Callable[[Decoder, int], Task]
TASKS = pytest.mark.parametrize("make_task", [value_head_task, rollout_task])


def build(make_task: MakeTask, options: Optimizer, seed: int = 0) -> State:
    model = Decoder(get_spec("llama", vocab=256, dim=16, n_layers=2, n_heads=2, context=16))
    init_weights(model, 0)  # the reference model is a copy of these weights
    task = make_task(model, seed)
    init_weights(model, seed)
    return start(model, options, task)


def run(state: State, options: Optimizer, steps: int) -> list[Metrics]:
    metrics: list[Metrics] = []
    loop = Loop(steps=steps, gradient_accumulation_steps=2, dtype="float32", seed=3)
    schedule = Schedule("wsd", warmup=2, decay=0)
    train(state, loop, options, schedule, lambda state, m: metrics.append(m))
    return metrics


def tensors(state: State) -> dict[str, torch.Tensor]:
    named = dict(state.named_parameters())
    moments = {f"{key}.{n}": x for n, p in named.items() for key, x in optimizer_tensors(state, n, p)}
    return {**named, **moments, **{f"state.{n}": x for n, x in state.task.trained_state().items()}}


@TASKS
@pytest.mark.parametrize("options", [Optimizer(lr=1e-2, ema=0.9), Optimizer("muon", lr=1e-2)], ids=["adamw", "muon"])
def test_a_resumed_task_is_uninterrupted_to_the_bit(make_task: MakeTask, options: Optimizer, tmp_path: Path) -> None:
    one, parts = build(make_task, options), build(make_task, options)
    losses = [float(m.loss) for m in run(one, options, 6)]
    first = run(parts, options, 3)
    saver = Saver(tmp_path, byte_level(), "text", 2)
    folder = saver.save(parts)
    resumed = build(make_task, options, seed=1)
    restore(folder, resumed)
    second = run(resumed, options, 6)
    assert [float(m.loss) for m in first + second] == losses
    expected, actual = tensors(one), tensors(resumed)
    assert expected.keys() == actual.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


def test_a_value_head_is_trained_and_the_reference_is_not(tmp_path: Path) -> None:
    options = Optimizer(lr=1e-2, ema=0.9)
    state = build(value_head_task, options)
    task = state.task
    assert isinstance(task, ValueHeadTask)
    reference = {name: x.clone() for name, x in task.reference.state_dict().items()}
    metrics = run(state, options, 60)
    assert float(metrics[-1].aux_metrics["value_loss"]) < 0.3 * float(metrics[0].aux_metrics["value_loss"])
    assert float(metrics[0].aux_metrics["distance"]) < 1e-6 < float(metrics[-1].aux_metrics["distance"])
    assert all(torch.equal(x, reference[name]) for name, x in task.reference.state_dict().items())
    assert set(task.trained_state()) == {"value_head.weight", "value_head.bias", "steps"}
    assert int(task.steps) == 60
    assert state.ema is not None and "task.value_head.weight" in state.ema
    assert not any("reference" in name for name, _ in state.named_parameters())
    groups = state.optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(state.model.parameters())) + 2
    saver = Saver(tmp_path, byte_level(), "text", 2)
    folder = saver.save(state)
    (folder / "task.safetensors").unlink()
    with pytest.raises(OneblockError, match=r"has no steps"):
        restore(folder, build(value_head_task, options))


def test_rollouts_of_the_current_model_raise_the_reward() -> None:
    options = Optimizer(lr=2e-2)
    state = build(rollout_task, options)
    rewards = [float(m.aux_metrics["reward"]) for m in run(state, options, 60)]
    assert np.mean(rewards[:5]) < 0.65
    assert np.mean(rewards[-5:]) > 0.9


def test_accumulated_gradients_of_a_value_head_are_those_of_one_batch() -> None:
    grads = []
    for size, accumulated in ((2, 3), (6, 1)):
        rows = PackedDataset(TEXT, 12, size, 0)
        state = build(lambda model, seed, rows=rows: ValueHeadTask(model, rows.batch), Optimizer())
        before = deepcopy(dict(state.named_parameters()))
        loop = Loop(steps=1, gradient_accumulation_steps=accumulated, dtype="float32")
        options = Optimizer(lr=1e-2, eps=1.0, weight_decay=0, max_grad_norm=0)
        state = start(state.model, options, state.task)
        train(state, loop, options, Schedule(warmup=0))
        grads.append({name: (p - before[name]).detach() for name, p in state.named_parameters()})
    for name, x in grads[0].items():
        torch.testing.assert_close(grads[1][name], x, atol=1e-8, rtol=1e-3)
    assert float(grads[0]["task.value_head.weight"].abs().max()) > 0


def test_pipeline_stages_refuse_a_task_with_modules() -> None:
    from oneblock.train.loop import check_task

    world = World(0, Mesh(pp=2))
    check_task(Task(ROWS.batch, next_token_loss), world)
    with pytest.raises(OneblockError, match="ValueHeadTask has modules of its own"):
        check_task(build(value_head_task, Optimizer()).task, world)
