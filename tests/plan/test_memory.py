"""Memory: sums by hand, and the activations against what torch really keeps for the backward pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.plan import memory, params, plan
from oneblock.spec import FAMILIES, Spec, spec

specs = st.sampled_from([build() for build in FAMILIES.values()])


def test_llama_3_8b_serves_from_24_gigabytes():
    serving = plan(spec("llama-3-8b"), context=8192, batch=4).serving
    assert serving.weights == 8_030_261_248 * 2
    assert serving.cache == 4 * 8192 * 131_072
    assert serving.total == serving.weights + serving.cache + serving.workspace < 24e9


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1.0625), ("int4", 0.5625)])
def test_weights_by_dtype(dtype: str, size: float):
    assert plan(spec("gpt2"), dtype=dtype).serving.weights == round(124_439_808 * size)


@given(specs, st.sampled_from(["float32", "bfloat16"]))
def test_training_states_are_16_bytes_a_parameter(built: Spec, dtype: str):
    assert memory.training(built, 64, dtype=dtype).states == 16 * params.total(built)


def test_workspace_does_not_grow_past_one_prefill():
    llama = spec("llama-3-8b")
    assert plan(llama, 100_000, 1).serving.workspace == plan(llama, 2048, 1).serving.workspace
    by_hand = 2048 * (2 * 4096 + 3 * 14336) * 2 + 128256 * 6
    assert plan(llama, 2048).serving.workspace == by_hand


def test_gpt2_activations_by_hand():
    """Per layer: 4 vectors at the norms, q k v and the answer, the MLP's two; fp32 softmax statistics of 12 heads."""
    layer = (4 * 768 + 4 * 768 + 2 * 3072) * 2 + 4 * 12
    assert memory.activations(spec("gpt2"), 2) == 12 * layer + 2 * 768 * 2
    assert memory.activations(spec("gpt2"), 2, checkpointing=True) == 12 * 768 * 2 + layer + 2 * 768 * 2


def test_logits_by_hand():
    assert memory.training(spec("gpt2"), 1024, 8).logits == 8 * 1024 * 50257 * (2 + 4 + 4)


@given(specs, st.integers(1, 300), st.integers(1, 8))
def test_activations_are_linear_in_tokens_and_checkpointing_saves(built: Spec, context: int, batch: int):
    full = memory.training(built, context, batch)
    kept = memory.training(built, context, batch, checkpointing=True)
    assert full.activations == batch * context * memory.training(built, 1, 1).activations
    assert kept.activations < full.activations
    assert kept.states == full.states and kept.logits == full.logits


def kept_for_backward(model: Decoder, tokens: int) -> float:
    """Bytes per token of the tensors that autograd saves, weights apart, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), x  # holding x keeps its address from being used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.hidden(torch.randint(0, model.spec.vocab, (1, tokens)))
    return sum(size for size, _ in kept.values()) / tokens


# Past 1024 tokens attention takes the fused path. On CPUs RMSNorm is several operations, which keep one vector more
# than the single kernel that GPUs have.
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gpt1", 0.05),
        ("gpt2", 0.05),
        ("opt", 0.05),
        ("gpt_neox", 0.06),
        ("phi", 0.06),
        ("llama", 0.2),
        ("mixtral", 0.2),
        ("qwen2_moe", 0.2),
        ("olmo2", 0.25),
    ],
)
def test_activations_are_what_torch_keeps(family: str, more: float):
    built = FAMILIES[family](context=2048)
    measured = kept_for_backward(Decoder(built), 1280)
    assert 0.95 < measured / memory.activations(built, size=4) < 1 + more


def test_plan_refuses_an_unknown_dtype():
    with pytest.raises(OneblockError, match="unknown dtype 'bf16': choose from float32"):
        plan(spec("gpt2"), dtype="bf16")
