"""The loss in parts against the loss written out, the routers' losses, and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oneblock.data.packed import IGNORE_INDEX, Batch
from oneblock.errors import OneblockError
from oneblock.kernels.attention.backend import FastAttention
from oneblock.kernels.fast_model import GroupedExperts
from oneblock.model import Decoder, Dropout, init_weights
from oneblock.model.decoder import Block
from oneblock.model.mlp import Moe
from oneblock.parallel.tensor_parallel import RowParallelLinear
from oneblock.parallel.world import World
from oneblock.plan.activations import ActivationCheckpointing
from oneblock.quant.formats import quantize_int8
from oneblock.quant.linear import QuantizedLinear
from oneblock.spec import get_spec
from oneblock.train import cross_entropy as parts
from oneblock.train.build import transform_model
from oneblock.train.cross_entropy import cross_entropy, token_logprobs
from oneblock.train.load_balancing import Routing
from oneblock.train.loop import ModelWithLoss, State, TrainStep, start
from oneblock.train.options import Loop, Objective, Optimizer, Schedule
from oneblock.train.task import Pretraining, Task


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


def step_of(state: State, loop: Loop) -> TrainStep:
    return TrainStep(ModelWithLoss(state.model, state.task), loop, Optimizer(max_grad_norm=0), Schedule(), World())


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
    monkeypatch.setattr(parts, "CACHE_CHUNK", 2 * 97 * 4)  # 2 of them in the cache,
    monkeypatch.setattr(parts, "VOCAB_CHUNK", 40)  # 40 words of the gradient
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
        state = start(model, Optimizer(max_grad_norm=0.0), Pretraining(batches.__getitem__))
        engine = step_of(state, Loop(dtype="float32", gradient_accumulation_steps=len(batches)))
        kept: dict[str, Tensor] = {}

        def keep(good: Tensor, model: Decoder = model, kept: dict[str, Tensor] = kept) -> None:
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        state.optimizer.step = keep
        engine.update(state)
        grads.append(kept)
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("head", HEADS)
def test_weights_per_token(head: str, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused loss with weights against weighted means over full logits: values and gradients."""
    monkeypatch.setattr(parts, "LOSS_CHUNK_BYTES", 5 * 97 * 8)
    monkeypatch.setattr(parts, "CACHE_CHUNK", 2 * 97 * 4)
    family, changes = HEADS[head]
    model = decoder(family, **changes)
    data = batch(model)
    weights = torch.rand(data.targets.shape, generator=torch.Generator().manual_seed(4))
    x = model.hidden_states(data.ids).detach()

    def naive(leaf: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.logits(leaf).float()
        w = weights * (data.targets != IGNORE_INDEX)
        entropy = F.cross_entropy(logits.flatten(0, 1), data.targets.flatten(), reduction="none").view_as(w)
        mean = (w * entropy).sum() / w.sum()
        return mean + z_loss * (w * logits.logsumexp(-1).square()).sum() / w.sum(), mean

    results = []
    for loss in (lambda leaf: cross_entropy(model, leaf, data.targets, z_loss, weights), naive):
        leaf = x.clone().requires_grad_()
        value, entropy = loss(leaf)
        model.zero_grad()
        (3 * value).backward()
        grads = [p.grad.clone() for p in model.head.parameters() if p.grad is not None]
        results.append([value.detach(), entropy.detach(), leaf.grad, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------ log-probabilities of tokens


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update, as LoRA wraps one."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base, self.in_features, self.out_features = base.requires_grad_(False), base.in_features, base.out_features
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class DropoutLinear(nn.Module):
    """Dropout before a linear layer, as adapters have."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.out_features = base, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(F.dropout(x, 0.5))


def quantized_head(model: Decoder) -> nn.Module:
    layer = QuantizedLinear(97, 16, 0, model.head.bias)
    layer.set_weight(*quantize_int8(model.head.weight.detach()))
    return layer


def row_parallel_head(model: Decoder) -> nn.Module:
    """The reduction over ranks of a tensor-parallel layer, on one rank."""
    return RowParallelLinear(nn.Linear(16, 97), lambda y: y)


LINEARS: dict[str, Callable[[Decoder], nn.Module]] = {
    "plain": lambda model: model.head,
    "adapted": lambda model: LowRankLinear(model.head),
    "quantized": quantized_head,
    "sharded": row_parallel_head,
}
TRANSFORMS: dict[str, Any] = {
    "none": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"softcap": 5.0, "temperature": 0.7},
    "all": {"logit_scale": 0.5, "softcap": 3.0, "temperature": 1.5},
}


def naive_logprobs(
    x: Tensor,
    head: nn.Module,
    targets: Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    logits = head(x).float() * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != IGNORE_INDEX)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", LINEARS)
def test_token_logprobs_are_those_of_full_logits(kind: str, transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and the gradients of a nonlinear function, for hidden states and every trained parameter of the head."""
    monkeypatch.setattr(parts, "LOSS_CHUNK_BYTES", 5 * 97 * 8)
    model = decoder("phi")
    data, head = batch(model), LINEARS[kind](model)
    x = model.hidden_states(data.ids).detach()
    advantages = torch.randn(data.targets.shape, generator=torch.Generator().manual_seed(5))
    results = []
    for logprobs_of in (token_logprobs, naive_logprobs):
        leaf = x.clone().requires_grad_()
        logprobs = logprobs_of(leaf, head, data.targets, **TRANSFORMS[transform])
        head.zero_grad()
        ((logprobs + 1).exp() * advantages).clamp(max=2).sum().backward()
        grads = [p.grad.clone() for p in head.parameters() if p.requires_grad and p.grad is not None]
        results.append([logprobs.detach(), leaf.grad, *grads])
    assert len(results[0]) == {"plain": 4, "adapted": 4, "quantized": 2, "sharded": 4}[kind]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert results[0][0].dtype == torch.float32
    assert float(results[0][0][0, 3:7].abs().max()) == 0  # ignored targets


def test_an_adapted_head_is_not_bypassed_by_the_loss() -> None:
    model = decoder("phi")
    data = batch(model)
    x = model.hidden_states(data.ids)
    before = cross_entropy(model, x, data.targets, 0.01)
    head = LowRankLinear(model.head)
    model.head = head
    loss, _ = cross_entropy(model, x, data.targets, 0.01)
    assert float(loss.detach()) != pytest.approx(float(before[0].detach()), abs=1e-4)
    torch.testing.assert_close(loss, written_out(model, x, data.targets, 0.01)[0])
    loss.backward()
    assert head.up.weight.grad is not None and head.base.weight.grad is None
    hooked = decoder("phi")

    def double(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return 2 * y

    hooked.head.register_forward_hook(double)
    x = hooked.hidden_states(data.ids)
    torch.testing.assert_close(cross_entropy(hooked, x, data.targets)[0], written_out(hooked, x, data.targets, 0.0)[0])


def test_token_logprobs_repeat_the_dropout_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LOSS_CHUNK_BYTES", 5 * 97 * 8)
    model = decoder()
    data = batch(model)
    head = DropoutLinear(model.head)
    x = model.hidden_states(data.ids).detach().requires_grad_()
    torch.manual_seed(0)
    token_logprobs(x, head, data.targets).sum().backward()
    torch.manual_seed(0)
    dropped = torch.cat([F.dropout(part, 0.5) for part in x.detach().flatten(0, 1).split(5)]) / x.detach().flatten(0, 1)
    leaf = x.detach().clone().requires_grad_()
    naive_logprobs(leaf.flatten(0, 1) * dropped, model.head, data.targets.flatten()).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, atol=1e-5, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_no_tensor_has_all_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LOSS_CHUNK_BYTES", 4 * 97 * 8)
    model = decoder()
    head = LINEARS[kind](model)
    x = torch.randn(2, 64, 16, requires_grad=True)
    targets = torch.randint(97, (2, 64))
    with LargestTensor() as largest:
        token_logprobs(x, head, targets, softcap=3.0).square().sum().backward()
    assert largest.numel <= max(x.numel(), 97 * 16)
    with LargestTensor() as naive:
        naive_logprobs(x, head, targets).sum().backward()
    assert naive.numel == 2 * 64 * 97


def test_token_logprobs_under_autocast() -> None:
    model = decoder()
    data = batch(model)
    x = model.hidden_states(data.ids).detach().requires_grad_()
    exact = token_logprobs(x, model.head, data.targets)
    exact.sum().backward()
    assert x.grad is not None
    exact_grad, x.grad = x.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = token_logprobs(x, model.head, data.targets)
    near.sum().backward()
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, atol=0.2, rtol=0.05)
    assert x.grad is not None
    assert float((x.grad - exact_grad).norm() / exact_grad.norm()) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_token_logprobs_on_a_gpu() -> None:
    model = decoder("phi")
    data = batch(model)
    x = model.hidden_states(data.ids).detach()
    results = []
    for device in ("cpu", "cuda"):
        leaf, head = x.to(device).requires_grad_(), LowRankLinear(decoder("phi").head).to(device)
        with torch.no_grad():
            for p in (head.down.weight, head.up.weight):
                p.fill_(0.1)
        logprobs = token_logprobs(leaf, head, data.targets.to(device), softcap=5.0, temperature=0.7)
        logprobs.square().sum().backward()
        assert leaf.grad is not None and head.up.weight.grad is not None
        results.append([logprobs.detach().cpu(), leaf.grad.cpu(), head.up.weight.grad.cpu()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-3)


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
    loss, seen = Pretraining(lambda n: data, routing=Routing(model, objective)).loss(model, data)
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
    loop, data = Loop(dtype="float32", activation_checkpointing=recompute), batch(model)
    transform_model(model, loop)
    task = Pretraining(lambda n: data, routing=Routing(model, Objective(load_balancing_weight=1.0)))
    state = start(model, Optimizer(lr=5e-2), task)
    engine = step_of(state, loop)
    found = [made.aux_metrics["load_balancing_loss"].item() for _ in range(40) if (made := engine.update(state))]
    assert abs(found[-1] - 1) < 0.5 * (found[0] - 1)  # 1: an even load


def test_a_bias_steers_without_a_gradient() -> None:
    model = leaning(1.0)
    loop, options = Loop(dtype="float32"), Objective(load_balancing="bias", load_balancing_weight=0.01)
    data = batch(model)
    state = start(model, Optimizer(lr=0.0), Pretraining(lambda n: data, routing=Routing(model, options)))
    before = model.blocks[0].mlp.router.bias.detach().clone()
    engine = step_of(state, loop)
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
        transform_model(model, Loop(activation_checkpointing=recompute))
        routing = Routing(model, Objective()) if family == "mixtral" else None
        learner = ModelWithLoss(model, Pretraining(lambda n: None, Dropout(residual=0.2), routing=routing))
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


def test_training_uses_fast_kernels_and_casts_inputs_once_under_autocast() -> None:
    model = Decoder(get_spec("mixtral", vocab=16, dim=16, n_layers=1, n_heads=2, hidden_dim=16, context=16))
    for _ in range(2):
        model = transform_model(ModelWithLoss(model, Task()).model, Loop())
    block = model.blocks[0]
    assert isinstance(block, Block) and isinstance(block.mlp, Moe)
    assert isinstance(model.attention_backend, FastAttention)
    assert isinstance(block.mlp.experts, GroupedExperts)
    assert len(block.attn._forward_pre_hooks) == len(block.mlp._forward_pre_hooks) == 1
    dtypes: list[torch.dtype] = []
    for linear in (block.attn.wq, block.attn.wk, block.mlp.router):
        linear.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(torch.arange(16)[None])
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 3
