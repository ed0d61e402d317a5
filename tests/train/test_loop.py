"""The loop's parts: what a step does, the learning rate, the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from oneblock.data import Rows
from oneblock.data.rows import Batch, in_order
from oneblock.model import Decoder, Dropout, init_weights
from oneblock.spec import spec
from oneblock.train.loop import Metrics, State, start, train
from oneblock.train.losses import evaluate, next_token
from oneblock.train.machine import has_bf16, precision
from oneblock.train.optim import build, decayed_names, share
from oneblock.train.options import Loop, Optimizer, Schedule

LOOP = Loop(steps=20, batch=4, dtype="float32")
TEXT = np.tile(np.arange(13, dtype=np.uint16), 40)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out: a busy machine would make threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def begin(seed: int = 0, **changes: object) -> State:
    model = Decoder(spec("llama", vocab=16, dim=16, n_layers=2, n_heads=2, context=16, **changes))
    init_weights(model, seed)
    return start(model, Optimizer(lr=1e-2))


def run(state: State, loop: Loop = LOOP, rows: Rows | None = None) -> list[float]:
    rows = rows or Rows(TEXT, 12, loop.batch, loop.seed)
    losses: list[float] = []

    def observe(state: State, metrics: Metrics) -> None:
        losses.append(float(metrics.loss))

    train(state, rows.batch, next_token, loop, Optimizer(lr=1e-2), Schedule(warmup=5), observe)
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
    run(small, replace(LOOP, batch=2, accumulate=3, steps=5))
    run(large, replace(LOOP, batch=6, steps=5))
    assert small.tokens == large.tokens == 5 * 6 * 12
    for a, b in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_dropout_is_applied_and_repeatable() -> None:
    state, rows = begin(), Rows(TEXT, 12, 4, 0)
    batch = rows.batch(0)
    torch.manual_seed(0)
    a = next_token(state.model, batch, Dropout(residual=0.5))
    torch.manual_seed(0)
    b = next_token(state.model, batch, Dropout(residual=0.5))
    assert a == b
    assert a != next_token(state.model, batch)


def test_ignored_targets_do_not_count() -> None:
    state, batch = begin(), Rows(TEXT, 12, 2, 0).batch(0)
    masked = Batch(batch.ids, batch.targets.clone(), 12)
    masked.targets[0] = -100
    alone = Batch(batch.ids[1:], batch.targets[1:], 12)
    torch.testing.assert_close(next_token(state.model, masked), next_token(state.model, alone))


def test_the_validation_loss_is_the_mean_over_all_tokens() -> None:
    state = begin()
    ids = torch.from_numpy(TEXT[:41].astype(np.int64))[None]
    parts = [state.model(ids[:, i : i + 12]).log_softmax(-1)[0] for i in range(0, 40, 12)]
    rows = torch.cat(parts)[:40]
    exact = -rows[torch.arange(40), ids[0, 1:]].mean()
    found = evaluate(state.model, in_order(TEXT[:41], 12, 2), precision(LOOP))
    assert found == pytest.approx(float(exact.detach()), abs=1e-5)


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    untied = Decoder(spec("gpt2", vocab=16, dim=16, n_layers=1, n_heads=2, context=16, tied=False))
    decayed = set(decayed_names(untied))
    assert {"blocks.0.attn.wq.weight", "blocks.0.mlp.down.weight", "head.weight"} <= decayed
    assert not {n for n in decayed if "norm" in n or n.endswith("bias") or "_in" in n or n.startswith(("embed", "pos"))}
    assert "head.weight" not in decayed_names(Decoder(spec("gpt2", vocab=16, dim=16, n_layers=1, n_heads=2, tied=True)))
    groups = build(untied, Optimizer(weight_decay=0.3)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(untied.parameters()))


def test_schedules() -> None:
    cosine, flat = Schedule("cosine", warmup=10, final=0.1), Schedule("flat", warmup=10, decay=0.25, final=0.1)
    assert share(0.0, 0, cosine) == pytest.approx(0.1)  # a tenth of the warm-up
    assert share(0.5, 50, cosine) == pytest.approx(0.55)
    assert share(0.5, 50, flat) == share(0.75, 75, flat) == 1.0
    assert share(0.875, 87, flat) == pytest.approx(0.55)
    for schedule in (cosine, flat):
        assert share(1.0, 100, schedule) == pytest.approx(0.1)
        assert share(1.2, 120, schedule) == pytest.approx(0.1)  # a step that outlasts the run's time


def test_clipping_bounds_the_step() -> None:
    state, rows = begin(), Rows(TEXT, 12, 4, 0)
    norms: list[float] = []

    def observe(state: State, metrics: Metrics) -> None:
        norms.append(float(metrics.norm))

    train(state, rows.batch, next_token, LOOP, Optimizer(lr=1e-2, clip=1e-3), Schedule(), observe)
    assert min(norms) > 1e-3  # the norm reported is the one before clipping
    grads = [p.grad for p in state.model.parameters()]
    assert grads == [None] * len(grads)


def test_time_ends_a_run() -> None:
    state = begin()
    run(state, replace(LOOP, seconds=0.3, steps=1))
    assert 0.3 <= state.seconds < 5
    assert state.step > 1


def test_asked_to_stop_it_stops_after_the_step() -> None:
    state, rows = begin(), Rows(TEXT, 12, 4, 0)

    def observe(state: State, metrics: Metrics) -> None:
        state.stop = metrics.step == 3

    train(state, rows.batch, next_token, LOOP, Optimizer(), Schedule(), observe)
    assert state.step == 3


def test_bf16_learns_as_fp32_does() -> None:
    assert isinstance(has_bf16("cpu"), bool)
    exact, rough = run(begin()), run(begin(), replace(LOOP, dtype="bfloat16"))
    assert exact != rough
    assert exact == pytest.approx(rough, abs=0.05)
