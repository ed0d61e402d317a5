"""The loss in parts against the loss written out, the routers' losses, and recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oneblock.data.packed import IGNORE_INDEX, Batch
from oneblock.errors import OneblockError
from oneblock.model import Decoder, Dropout, init_weights
from oneblock.parallel.world import World
from oneblock.plan.activations import ActivationCheckpointing
from oneblock.spec import get_spec
from oneblock.train import cross_entropy as parts
from oneblock.train.build import learner_for
from oneblock.train.cross_entropy import cross_entropy
from oneblock.train.load_balancing import Routing
from oneblock.train.loop import TrainStep, start
from oneblock.train.losses import pretraining
from oneblock.train.options import Loop, Objective, Optimizer, Schedule


def decoder(family: str = "llama", **changes: object) -> Decoder:
    model = Decoder(get_spec(family, vocab=97, dim=16, n_layers=2, n_heads=2, context=32, **changes))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # biases and gains too
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def batch(model: Decoder, rows: int = 3, length: int = 16) -> Batch:
    ids = torch.randint(model.spec.vocab, (rows, length + 1), generator=torch.Generator().manual_seed(2))
    targets = ids[:, 1:].clone()
    targets[0, 3:7] = IGNORE_INDEX
    return Batch(ids[:, :-1], targets, int((targets != IGNORE_INDEX).sum()))


def written_out(model: Decoder, x: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = model.logits(x).flatten(0, 1).float()
    entropy = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
    sums = logits.logsumexp(-1)[targets.flatten() != IGNORE_INDEX]
    return entropy + z_loss * sums.square().mean(), entropy


HEADS = {
    "plain": ("llama", {}),
    "tied": ("llama", {"tied": True}),
    "capped": ("gemma2", {}),
    "scaled": ("cohere2", {}),
    "biased": ("phi", {}),
}


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("head", HEADS)
def test_in_parts_it_is_the_loss_written_out(head: str, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LOSS_CHUNK_BYTES", 5 * 97 * 8)  # 5 rows at a time,
    monkeypatch.setattr(parts, "FAST", 2 * 97 * 4)  # 2 of them in the cache,
    monkeypatch.setattr(parts, "WORDS", 40)  # 40 words of the gradient
    family, changes = HEADS[head]
    model = decoder(family, **changes)
    data = batch(model)
    x = model.hidden_states(data.ids).detach()
    found = []
    for loss in (cross_entropy, written_out):
        leaf = x.clone().requires_grad_()
        value, entropy = loss(model, leaf, data.targets, z_loss)
        model.zero_grad()
        (3 * value).backward()
        grads = [p.grad.clone() for p in model.head.parameters() if p.grad is not None]
        found.append([value.detach(), entropy.detach(), leaf.grad, *grads])
    assert len(found[0]) == len(found[1]) >= 4
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_frozen_weights_get_no_gradient() -> None:
    model = decoder()
    model.head.weight.requires_grad_(False)
    data = batch(model)
    loss, _ = cross_entropy(model, model.hidden_states(data.ids), data.targets)
    loss.backward()
    assert model.head.weight.grad is None
    assert model.blocks[0].attn.wq.weight.grad is not None


def test_bf16_products_are_near() -> None:
    model = decoder()
    data = batch(model)
    exact, _ = cross_entropy(model, model.hidden_states(data.ids), data.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, _ = cross_entropy(model, model.hidden_states(data.ids), data.targets)
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(exact.item(), abs=0.1)


def test_ragged_batches_weigh_by_tokens() -> None:
    """Gradients of two batches of unlike size in one step are those of both at once."""
    whole = decoder()
    data = batch(whole, rows=4)
    data.targets[2:, 2:] = IGNORE_INDEX
    halves = [Batch(data.ids[i : i + 2], data.targets[i : i + 2], 0) for i in (0, 2)]
    halves = [Batch(h.ids, h.targets, int((h.targets != IGNORE_INDEX).sum())) for h in halves]
    assert halves[0].count > 3 * halves[1].count
    large = Batch(data.ids, data.targets, sum(h.count for h in halves))
    grads = []
    for batches in ([large], halves):
        model = decoder()
        engine = TrainStep(
            learner_for(model, Loop(dtype="float32"), Objective(), None, World()),
            batches.__getitem__,
            Loop(dtype="float32", gradient_accumulation_steps=len(batches)),
            Optimizer(max_grad_norm=0.0),
            Schedule(),
            World(),
        )
        state = start(model, Optimizer())
        kept: dict[str, Tensor] = {}

        def keep(good: Tensor, model: Decoder = model, kept: dict[str, Tensor] = kept) -> None:
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        state.optimizer.step = keep
        engine.update(state)
        grads.append(kept)
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------ experts


def leaning(bias: float) -> Decoder:
    """Routers that prefer the first expert by that much."""
    model = decoder("gpt_oss")
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight.mul_(0.01)
            block.mlp.router.bias.zero_()[0] = bias
    return model


def test_even_routing_costs_one_and_lopsided_more() -> None:
    found = []
    for bias in (0.0, 3.0):
        model = leaning(bias)
        routing, data = Routing(model, Objective(load_balancing_weight=1.0)), batch(model)
        model(data.ids)
        _, seen = routing.losses()
        found.append(seen["load_balancing_loss"].item())
        moe: Any = model.blocks[0].mlp.spec
        assert seen["load"].shape == (2, moe.n_experts)
        torch.testing.assert_close(seen["load"].sum(-1), torch.ones(2))
        assert routing.counts is not None
        assert float(routing.counts.sum()) / data.ids.numel() == 2 * moe.top_k
    assert found[0] == pytest.approx(1.0, abs=0.01)
    assert found[1] > 1.2


def test_the_routers_losses_by_hand() -> None:
    model = decoder("mixtral")
    data, logits = batch(model), {}
    for i, block in enumerate(model.blocks):
        block.mlp.router.register_forward_hook(lambda m, a, out, i=i: logits.__setitem__(i, out.detach()))
    objective = Objective(load_balancing_weight=0.5, router_z_loss=0.25)
    loss, seen = pretraining(model, data, routing=Routing(model, objective))
    even, z = [], []
    for found in logits.values():
        shares = found.softmax(-1)
        chosen = F.one_hot(shares.topk(2, -1).indices, found.shape[-1]).float().sum((0, 1))
        even.append(found.shape[-1] * (chosen / chosen.sum() * shares.mean(0)).sum())
        z.append(found.logsumexp(-1).square().mean())
    expected = seen["loss"] + 0.5 * sum(even) / 2 + 0.25 * sum(z) / 2
    torch.testing.assert_close(loss.detach(), expected.detach())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_balance_is_learned(recompute: ActivationCheckpointing) -> None:
    """From a router that prefers one expert, steps with the loss bring the others in."""
    model = leaning(3.0)
    loop = Loop(dtype="float32", activation_checkpointing=recompute)
    learner = learner_for(model, loop, Objective(load_balancing_weight=1.0), None, World())
    data, state = batch(model), start(model, Optimizer(lr=5e-2))
    engine = TrainStep(learner, lambda n: data, loop, Optimizer(), Schedule(), World())
    found = [made.aux_metrics["load_balancing_loss"].item() for _ in range(40) if (made := engine.update(state))]
    assert abs(found[-1] - 1) < 0.5 * (found[0] - 1)  # 1: an even load


def test_a_bias_steers_without_a_gradient() -> None:
    model = leaning(1.0)
    loop, options = Loop(dtype="float32"), Objective(load_balancing="bias", load_balancing_weight=0.01)
    learner = learner_for(model, loop, options, None, World())
    state = start(model, Optimizer(lr=0.0))
    before = model.blocks[0].mlp.router.bias.detach().clone()
    data = batch(model)
    engine = TrainStep(learner, lambda n: data, loop, Optimizer(), Schedule(), World())
    state.optimizer.set_rate(0.0)
    made = engine.update(state)
    assert made is not None
    first = last = made.aux_metrics["load"]
    moved = model.blocks[0].mlp.router.bias.detach() - before
    most, least = first[0].argmax(), first[0].argmin()
    assert float(moved[most]) == pytest.approx(-0.01, abs=1e-6)
    assert float(moved[least]) == pytest.approx(0.01, abs=1e-6)
    for _ in range(60):
        made = engine.update(state)
        assert made is not None
        last = made.aux_metrics["load"]
    assert float(last.max()) < float(first.max())


def test_biases_that_are_not_there_cannot_steer() -> None:
    with pytest.raises(OneblockError, match="routers' biases"):
        Routing(decoder("mixtral"), Objective(load_balancing="bias"))


# ------------------------------------------------------------------ recomputation


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral"])
def test_recomputed_gradients_are_the_same(family: str, mode: ActivationCheckpointing) -> None:
    grads, kept = [], []
    modes: tuple[ActivationCheckpointing, ...] = ("none", mode)
    for recompute in modes:
        model = decoder(family)
        learner = learner_for(
            model, Loop(activation_checkpointing=recompute), Objective(), Dropout(residual=0.2), World()
        )
        held: dict[int, int] = {}

        def pack(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss, _ = learner(batch(model))
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(held.values()))
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-6, rtol=1e-5)
    if mode == "full":
        assert kept[1] < kept[0]
