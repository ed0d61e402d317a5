"""Blocks, MoE, norms, initialisation and the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from oneblock.errors import OneblockError
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import Decoder, init_weights
from oneblock.model import mlp as m
from oneblock.spec import Attention, Layer, Mlp, Moe, Norm, Positions, Rope, Spec

BASE = Spec(
    vocab=61, dim=32, n_layers=2, pattern=(Layer(Attention(4, 2, 8, rope=Rope()), Mlp(48)),), context=64, norm=Norm()
)
IDS = torch.arange(20)[None] % 61


def randomised(spec: Spec) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


MOES = {
    "mixtral": Moe(4, 2, Mlp(16)),
    "llama4": Moe(4, 1, Mlp(16), score_func="sigmoid", renormalize=False, scale_expert_input=True, shared=Mlp(24)),
    "qwen2": Moe(4, 3, Mlp(16), renormalize=False, shared=Mlp(24), shared_gate=True),
    "gpt-oss": Moe(4, 2, Mlp(16, "quick_gelu", bias=True, clamp=0.5, up_offset=1.0), router_bias=True),
    "plain": Moe(3, 1, Mlp(10, "gelu", gated=False, bias=True)),
}


def one_token(moe: m.Moe, x: torch.Tensor) -> torch.Tensor:
    """MoE as its definition says, for one token (dim,)."""
    spec, e = moe.spec, moe.experts
    logits = moe.router(x)
    scores = logits.softmax(-1) if spec.score_func == "softmax" else logits.sigmoid()
    chosen = scores.argsort(descending=True)[: spec.top_k]
    total = scores[chosen].sum() if spec.renormalize else 1.0
    out = torch.zeros_like(x)
    for i in chosen.tolist():
        weight = scores[i] / total
        h = x * weight if spec.scale_expert_input else x

        def product(w: torch.Tensor | None, b: torch.Tensor | None, h: torch.Tensor, i: int = i) -> torch.Tensor:
            assert w is not None
            return F.linear(h, w[i], None if b is None else b[i])

        gate = product(e.gate, e.gate_bias, h) if spec.expert.gated else None
        y = product(e.down, e.down_bias, m.activate(spec.expert, product(e.up, e.up_bias, h), gate))
        out += y if spec.scale_expert_input else y * weight
    if moe.shared is not None:
        y = moe.shared(x)
        out += y if moe.shared_gate is None else torch.sigmoid(moe.shared_gate(x)) * y
    return out


@pytest.mark.parametrize("name", MOES)
@pytest.mark.parametrize("grouped", [True, False])
def test_experts_equal_one_token_at_a_time(name: str, grouped: bool) -> None:
    torch.manual_seed(0)
    model = Decoder(replace(BASE, n_layers=1, pattern=(replace(BASE.pattern[0], mlp=MOES[name]),)))
    if grouped:
        use_fast_kernels(model)
    moe = model.blocks[0].mlp
    assert isinstance(moe, m.Moe)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 9, 32)
    expected = torch.stack([one_token(moe, token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(moe(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MOES)
def test_gradients_of_grouped_experts_equal_the_reference(name: str) -> None:
    spec = replace(BASE, pattern=(replace(BASE.pattern[0], mlp=MOES[name]),))
    model = randomised(spec)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        F.cross_entropy(model(IDS)[0], IDS[0]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    reference = gradients()
    use_fast_kernels(model)
    assert len(reference) == len(list(model.parameters()))
    for a, b in zip(reference, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("residual", ["pre", "post", "sandwich", "output", "parallel", "parallel_two"])
def test_norm_placement(residual: str) -> None:
    model = randomised(replace(BASE, n_layers=1, pattern=(replace(BASE.pattern[0], residual=residual),)))
    block = model.blocks[0]
    seen: dict[str, torch.Tensor] = {}
    for name in ("attn", "mlp"):
        getattr(block, name).register_forward_hook(lambda _, args, y, name=name: seen.update({name: y}))
    step_input = {}
    block.register_forward_hook(lambda _, args, y: step_input.update(x=args[0], y=y))
    model(IDS)
    x, y, attn, mlp = step_input["x"], step_input["y"], seen["attn"], seen["mlp"]
    expected = {
        "pre": lambda: x + attn + mlp,
        "post": lambda: block.mlp_out(block.attn_out(x + attn) + mlp),
        "sandwich": lambda: x + block.attn_out(attn) + block.mlp_out(mlp),
        "output": lambda: x + block.attn_out(attn) + block.mlp_out(mlp),
        "parallel": lambda: x + attn + mlp,
        "parallel_two": lambda: x + attn + mlp,
    }[residual]()
    torch.testing.assert_close(y, expected)
    norms = {name for name, _ in block.named_children() if "weight" in dict(getattr(block, name).named_parameters())}
    assert (
        norms
        == {
            "pre": {"attn_in", "mlp_in"},
            "post": {"attn_out", "mlp_out"},
            "sandwich": {"attn_in", "mlp_in", "attn_out", "mlp_out"},
            "output": {"attn_out", "mlp_out"},
            "parallel": {"attn_in"},
            "parallel_two": {"attn_in", "mlp_in"},
        }[residual]
    )


def test_a_tied_head_is_the_embedding() -> None:
    model = Decoder(replace(BASE, tied=True))
    assert model.head.weight is model.embed.weight
    assert "head.weight" in model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Decoder(BASE).parameters()) - 61 * 32


def test_sequences_longer_than_the_position_table_are_refused() -> None:
    model = Decoder(replace(BASE, positions=Positions(16, offset=2)))
    with pytest.raises(OneblockError, match="20 tokens exceed the model's 16 position embeddings"):
        model(IDS)


def test_sinusoidal_positions_distinguish_equal_tokens() -> None:
    nope = replace(BASE, pattern=(replace(BASE.pattern[0], attn=Attention(4, 2, 8)),))
    same = torch.full((1, 12), 7)
    blind = randomised(nope)(same)
    torch.testing.assert_close(blind[:, 0], blind[:, -1], atol=1e-5, rtol=1e-5)
    placed = randomised(replace(nope, positions=Positions(64, "sinusoidal")))(same)
    assert (placed[:, 0] - placed[:, -1]).abs().max() > 0.1


def test_cross_attention_is_skipped_without_an_image() -> None:
    cross = Layer(Attention(4, 2, 8, qk_norm="head", cross=True), Mlp(48), gated=True)
    model = randomised(replace(BASE, pattern=(BASE.pattern[0], cross), embed_extra=8))
    image = torch.randn(1, 5, 32)
    plain, seeing = model(IDS), model(IDS, image=image)
    assert (plain - seeing).abs().max() > 0.1
    assert (seeing - model(IDS, image=image.flip(1))).abs().max() < 1e-4  # image tokens have no order
    with torch.no_grad():
        model.blocks[1].attn_gate.zero_()
        model.blocks[1].mlp_gate.zero_()
    torch.testing.assert_close(model(IDS, image=image), plain)
    assert model.embed.weight.shape[0] == 61 + 8
    assert model.head.weight.shape[0] == 61


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("scale_in_fp32", [False, True])
def test_norms_compute_in_fp32_and_scale_in_the_stated_dtype(
    kind: Literal["rms", "layer"], scale_in_fp32: bool
) -> None:
    from oneblock.model.norm import Norm as Module

    norm = Module(Norm(kind, 1e-6, kind == "layer", 1.0, scale_in_fp32), 64)
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    norm = norm.bfloat16()
    x = torch.randn(5, 64).bfloat16()
    h = x.float() - (x.float().mean(-1, keepdim=True) if kind == "layer" else 0)
    h = h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    w = norm.weight.float() + 1
    if kind == "rms":
        exact = h.bfloat16() * w.bfloat16() if not scale_in_fp32 else (h * w).bfloat16()
        assert torch.equal(norm(x), exact)
    else:
        torch.testing.assert_close(norm(x).float(), h * w.bfloat16().float(), atol=0.05, rtol=0.02)


def test_initial_weights_depend_only_on_the_seed() -> None:
    spec = replace(BASE, pattern=(replace(BASE.pattern[0], mlp=MOES["gpt-oss"]),), norm=Norm(weight_offset=1.0))
    one, same, other = Decoder(spec), Decoder(spec), Decoder(spec)
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        init_weights(model, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)
    std = 0.02 * (768 / spec.dim) ** 0.5
    assert one.embed.weight.std().item() == pytest.approx(std, rel=0.1)
    assert one.blocks[0].attn.wo.weight.std().item() == pytest.approx(std / 2, rel=0.1)  # 2 layers: sqrt(4)
    assert one.norm.weight.abs().max() == 0  # stored as gain - 1


def test_bf16_stays_close_to_fp32() -> None:
    model = randomised(BASE)
    y = model(IDS)
    assert (model.bfloat16()(IDS).float() - y).abs().max() < 0.2 * y.abs().max()
