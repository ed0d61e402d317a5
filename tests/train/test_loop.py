"""The loop's parts: what a step does, the learning rate, the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from oneblock.data.packed import Batch, PackedDataset, sequential_batches
from oneblock.errors import OneblockError
from oneblock.kernels.build import has_compiler
from oneblock.model import Decoder, Dropout, init_weights
from oneblock.spec import get_spec
from oneblock.train.build import compiles, transform_model
from oneblock.train.loop import Metrics, State, start, train
from oneblock.train.machine import has_bf16, precision
from oneblock.train.optim import lr_ratio, micro_batches_before, micro_batches_in
from oneblock.train.options import Loop, Optimizer, Schedule
from oneblock.train.task import Batches, Loss, Task, evaluate, next_token_loss

LOOP = Loop(steps=20, batch_size=4, dtype="float32")
TEXT = np.tile(np.arange(13, dtype=np.uint16), 40)


def begin(seed: int = 0, **changes: object) -> State:
    model = Decoder(get_spec("llama", vocab=16, dim=16, n_layers=2, n_heads=2, context=16, **changes))
    init_weights(model, seed)
    return start(model, Optimizer(lr=1e-2))


def run_task(state: State, batches: Batches, loss: Loss, *options: Any) -> None:
    state.task = Task(batches, loss)
    train(state, *options)


def run(state: State, loop: Loop = LOOP, rows: PackedDataset | None = None) -> list[float]:
    rows = rows or PackedDataset(TEXT, 12, loop.batch_size, loop.seed)
    losses: list[float] = []

    def observe(state: State, metrics: Metrics) -> None:
        losses.append(float(metrics.loss))

    run_task(state, rows.batch, next_token_loss, loop, Optimizer(lr=1e-2), Schedule(warmup=5), observe)
    return losses


def test_it_learns_a_text_by_heart() -> None:
    losses = run(begin(), replace(LOOP, steps=150))
    assert losses[0] == pytest.approx(np.log(16), abs=0.3)
    assert losses[-1] < 0.05


def test_two_runs_are_equal_to_the_bit() -> None:
    one, two, other = begin(), begin(), begin(seed=1)
    assert run(one) == run(two)
    assert run(other) != run(begin())
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_batches_are_one_large_batch() -> None:
    small, large = begin(), begin()
    run(small, replace(LOOP, batch_size=2, gradient_accumulation_steps=3, steps=5))
    run(large, replace(LOOP, batch_size=6, steps=5))
    assert small.tokens == large.tokens == 5 * 6 * 12
    for a, b in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_dropout_is_applied_and_repeatable() -> None:
    state, rows = begin(), PackedDataset(TEXT, 12, 4, 0)
    batch = rows.batch(0)
    torch.manual_seed(0)
    a = next_token_loss(state.model, batch, Dropout(residual=0.5))
    torch.manual_seed(0)
    b = next_token_loss(state.model, batch, Dropout(residual=0.5))
    assert a == b
    assert a != next_token_loss(state.model, batch)


def test_ignored_targets_do_not_count() -> None:
    state, batch = begin(), PackedDataset(TEXT, 12, 2, 0).batch(0)
    masked = Batch(batch.ids, batch.targets.clone(), 12)
    masked.targets[0] = -100
    alone = Batch(batch.ids[1:], batch.targets[1:], 12)
    torch.testing.assert_close(next_token_loss(state.model, masked), next_token_loss(state.model, alone))


def test_the_validation_loss_is_the_mean_over_all_tokens() -> None:
    state = begin()
    ids = torch.from_numpy(TEXT[:41].astype(np.int64))[None]
    parts = [state.model(ids[:, i : i + 12]).log_softmax(-1)[0] for i in range(0, 40, 12)]
    rows = torch.cat(parts)[:40]
    exact = -rows[torch.arange(40), ids[0, 1:]].mean()
    found = evaluate(state.model, sequential_batches(TEXT[:41], 12, 2), precision(LOOP))
    assert found == pytest.approx(float(exact.detach()), abs=1e-5)


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    untied = Decoder(get_spec("gpt2", vocab=16, dim=16, n_layers=1, n_heads=2, context=16, tied=False))
    groups = start(untied, Optimizer(weight_decay=0.3)).optimizer.param_groups
    names = {id(p): name for name, p in untied.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert {"blocks.0.attn.wq.weight", "blocks.0.mlp.down.weight", "head.weight"} <= decayed
    assert not {n for n in decayed if "norm" in n or n.endswith("bias") or "_in" in n or n.startswith(("embed", "pos"))}
    tied = Decoder(get_spec("gpt2", vocab=16, dim=16, n_layers=1, n_heads=2, tied=True))
    tied_groups = start(tied, Optimizer()).optimizer.param_groups
    assert all(p is not tied.head.weight for p in tied_groups[0]["params"])
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(untied.parameters()))


def test_schedules() -> None:
    cosine = Schedule("cosine", warmup=10, min_lr_ratio=0.1)
    linear = Schedule("linear", warmup=10, min_lr_ratio=0.1)
    wsd = Schedule("wsd", warmup=10, decay=0.25, min_lr_ratio=0.1)
    assert [lr_ratio(0.55, 55, schedule) for schedule in (cosine, linear)] == pytest.approx([0.55, 0.55])
    assert lr_ratio(0.5, 50, wsd) == lr_ratio(0.75, 75, wsd) == 1.0
    assert lr_ratio(0.875, 87, wsd) == pytest.approx(0.55)
    for schedule in (cosine, linear, wsd):
        assert lr_ratio(1.0, 100, schedule) == pytest.approx(0.1)
        assert lr_ratio(1.2, 120, schedule) == pytest.approx(0.1)  # a step that outlasts the run's time


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("decay", [0.3, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
def test_the_warmup_ends_at_the_learning_rate(
    name: Literal["cosine", "linear", "wsd"], decay: float, warmup: int
) -> None:
    schedule = Schedule(name, warmup=warmup, decay=decay)
    ratios = [lr_ratio(step / 100, step, schedule) for step in range(100)]
    assert ratios[warmup] == 1.0 == max(ratios)
    assert ratios[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert all(a >= b for a, b in zip(ratios[warmup:], ratios[warmup + 1 :], strict=False))
    assert ratios[-1] < 0.06


def test_large_seeds_train() -> None:
    run(begin(seed=2**63 - 1), replace(LOOP, seed=2**63 - 1, steps=2))


def test_clipping_bounds_the_step() -> None:
    state, rows = begin(), PackedDataset(TEXT, 12, 4, 0)
    norms: list[float] = []

    def observe(state: State, metrics: Metrics) -> None:
        norms.append(float(metrics.grad_norm))

    run_task(state, rows.batch, next_token_loss, LOOP, Optimizer(lr=1e-2, max_grad_norm=1e-3), Schedule(), observe)
    assert min(norms) > 1e-3  # the norm reported is the one before clipping
    grads = [p.grad for p in state.model.parameters()]
    assert grads == [None] * len(grads)


def test_time_ends_a_run() -> None:
    state = begin()
    run(state, replace(LOOP, seconds=0.3, steps=1))
    assert 0.3 <= state.seconds < 5
    assert state.step > 1


def test_asked_to_stop_it_stops_after_the_step() -> None:
    state, rows = begin(), PackedDataset(TEXT, 12, 4, 0)

    def observe(state: State, metrics: Metrics) -> None:
        state.stop = metrics.step == 3

    run_task(state, rows.batch, next_token_loss, LOOP, Optimizer(), Schedule(), observe)
    assert state.step == 3


def test_bf16_learns_as_fp32_does() -> None:
    assert isinstance(has_bf16("cpu"), bool)
    exact, rough = run(begin()), run(begin(), replace(LOOP, dtype="bfloat16"))
    assert exact != rough
    assert exact == pytest.approx(rough, abs=0.05)


def test_a_ramp_grows_the_step_and_skips_no_batch() -> None:
    sizes = [micro_batches_in(step, 8, 5) for step in range(8)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[5:] == [8, 8, 8]
    for step in range(8):
        assert micro_batches_before(step, 8, 5) == sum(sizes[:step])
    seen: list[int] = []
    state, rows = begin(), PackedDataset(TEXT, 12, 2, 0)

    def batch(n: int) -> Batch:
        seen.append(n)
        return rows.batch(n)

    loop = replace(LOOP, batch_size=2, gradient_accumulation_steps=4, steps=6)
    run_task(state, batch, next_token_loss, loop, Optimizer(), Schedule(batch_size_warmup_steps=3))
    assert seen == list(range(len(seen)))
    assert state.tokens == len(seen) * 2 * 12 == micro_batches_before(6, 4, 3) * 24


def test_asked_to_stop_between_batches_it_leaves_the_step() -> None:
    """A step of many batches may take longer than a machine that is taken away leaves."""
    state, rows, seen = begin(), PackedDataset(TEXT, 12, 2, 0), []

    def loss(model: Decoder, batch: Batch) -> torch.Tensor:
        seen.append(len(seen))
        state.stop = len(seen) == 7  # in the second step
        return next_token_loss(model, batch)

    run_task(
        state, rows.batch, loss, replace(LOOP, batch_size=2, gradient_accumulation_steps=5), Optimizer(), Schedule()
    )
    assert len(seen) == 7
    assert state.step == 1
    assert state.tokens == 5 * 2 * 12
    assert all(p.grad is None for p in state.model.parameters())


def test_the_average_follows_the_weights() -> None:
    model = begin().model
    options = Optimizer(lr=1e-2, ema=0.5)
    state = start(model, options)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    def observe(state: State, metrics: Metrics) -> None:
        for name, p in state.model.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * p.detach()

    run_task(
        state,
        PackedDataset(TEXT, 12, 4, 0).batch,
        next_token_loss,
        replace(LOOP, steps=5),
        options,
        Schedule(warmup=1),
        observe,
    )
    assert state.ema is not None
    for name, mean in state.ema.items():
        torch.testing.assert_close(mean, expected[name])
        assert name == "embed.weight" or not torch.equal(mean, dict(model.named_parameters())[name])


def test_a_bad_step_changes_nothing() -> None:
    options = Optimizer("muon", lr=1e-2, ema=0.5)
    state = start(begin().model, options)
    rows, goods = PackedDataset(TEXT, 12, 4, 0), []

    def bad(model: Decoder, batch: Batch) -> torch.Tensor:
        loss = next_token_loss(model, batch)
        return loss * float("nan") if state.step == 2 else loss

    kept: list[list[torch.Tensor]] = []

    def observe(state: State, metrics: Metrics) -> None:
        goods.append(bool(metrics.is_finite))
        assert state.ema is not None
        everything = [*state.model.parameters(), *state.ema.values()]
        everything += [x for p in state.model.parameters() for x in state.optimizer.state_of(p).values()]
        kept.append([x.detach().clone() for x in everything])

    run_task(state, rows.batch, bad, replace(LOOP, steps=4), options, Schedule(warmup=1), observe)
    assert goods == [True, True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], kept[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept[2], kept[3], strict=True))


def test_muon_takes_the_blocks_matrices_and_learns() -> None:
    model = begin().model
    parts = start(model, Optimizer("muon", lr=1e-2, matrix_lr=2e-2)).optimizer.parts
    muon, adamw = ([p for group in part.param_groups for p in group["params"]] for part in parts)
    assert len(muon) == 2 * 7
    assert {p.dim() for p in muon} == {2}
    assert {id(p) for p in muon + adamw} == {id(p) for p in model.parameters()}
    assert [part.param_groups[0]["peak_lr"] for part in parts] == [2e-2, 1e-2]
    state = start(model, Optimizer("muon", lr=1e-2))
    losses: list[float] = []
    run_task(
        state,
        PackedDataset(TEXT, 12, 4, 0).batch,
        next_token_loss,
        replace(LOOP, steps=60),
        Optimizer("muon"),
        Schedule(warmup=5),
        lambda state, metrics: losses.append(metrics.loss.item()),
    )
    assert losses[-1] < 0.2


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_learn_the_same() -> None:
    losses: dict[str, list[float]] = {}
    switches: tuple[Literal["off", "on"], ...] = ("off", "on")
    for switch in switches:
        state, found = begin(), losses.setdefault(switch, [])
        loop = replace(LOOP, steps=4, compile=switch)
        transform_model(state.model, loop)

        def observe(state: State, metrics: Metrics, found: list[float] = found) -> None:
            found.append(metrics.loss.item())

        batches = PackedDataset(TEXT, 12, 4, 0).batch
        run_task(state, batches, next_token_loss, loop, Optimizer(), Schedule(warmup=1), observe)
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-4)


def test_where_compiling_pays() -> None:
    small = get_spec("llama", vocab=64, dim=64, n_layers=2, n_heads=2, context=64)
    assert not compiles(small, Loop(steps=10), 64)
    assert compiles(small, Loop(steps=10**9), 64) == has_compiler()
    assert compiles(small, Loop(compile="on"), 64)
    assert not compiles(small, Loop(steps=10**9, compile="off"), 64)


def test_fp8_wants_its_hardware() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may have it")
    with pytest.raises(OneblockError, match="--fp8 needs a GPU"):
        transform_model(begin().model, Loop(fp8=True))
