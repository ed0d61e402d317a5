"""Memory: sums by hand, and the activations against what torch really keeps for the backward pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oneblock.errors import OneblockError
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import Decoder
from oneblock.plan import TrainingConfig, memory, params, plan_model
from oneblock.plan.activations import ActivationConfig, activations
from oneblock.spec import FAMILIES, Spec, get_spec

specs = st.sampled_from([build() for build in FAMILIES.values()])


def test_llama_3_8b_serves_from_24_gigabytes():
    serving = plan_model(get_spec("llama-3-8b"), context=8192, batch=4).serving
    assert serving.weights == 8_030_261_248 * 2
    assert serving.cache == 4 * 8192 * 131_072
    assert serving.total == serving.weights + serving.cache + serving.workspace < 24e9


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1.0625), ("int4", 0.5625)])
def test_weights_by_dtype(dtype: str, size: float):
    assert plan_model(get_spec("gpt2"), dtype=dtype).serving.weights == round(124_439_808 * size)


@given(specs, st.sampled_from(["float32", "bfloat16"]))
def test_training_states_are_16_bytes_a_parameter(built: Spec, dtype: str):
    assert memory.training(built, 64, config=TrainingConfig(dtype)).states == 16 * params.total(built)


def test_smaller_states_and_larger_ones():
    gpt2 = get_spec("gpt2")
    count, matrices = params.total(gpt2), 12 * 12 * 768 * 768
    bytes_of = {
        kind: memory.training(gpt2, 64, config=TrainingConfig(optimizer=kind)).optimizer for kind in ("adamw", "muon")
    }
    assert bytes_of["adamw"] == 8 * count
    assert bytes_of["muon"] == pytest.approx(8 * count - 4 * matrices, rel=0.001)
    assert memory.training(gpt2, 64, config=TrainingConfig(optimizer="adamw8bit")).optimizer < 2.1 * count
    assert memory.training(gpt2, 64, config=TrainingConfig(ema=True)).optimizer == 12 * count


def test_workspace_does_not_grow_past_one_prefill():
    llama = get_spec("llama-3-8b")
    assert plan_model(llama, 100_000, 1).serving.workspace == plan_model(llama, 2048, 1).serving.workspace
    by_hand = 2048 * (2 * 4096 + 3 * 14336) * 2 + 128256 * 6
    assert plan_model(llama, 2048).serving.workspace == by_hand


def test_gpt2_activations_by_hand():
    """Per layer: fp32 at two norms; what products read; q k v and the answer, the MLP's two; fp32 sums of 12 heads."""
    layer = 2 * 768 * 4 + (2 * 768 + 4 * 768 + 2 * 3072) * 2 + 4 * 12
    ends = 768 * 4 + 768 * 2
    gpt2, kept = get_spec("gpt2"), ActivationConfig(2, 1024)
    assert activations(gpt2, kept) == 12 * layer + ends
    assert activations(gpt2, kept, "full") == 12 * 768 * 4 + layer + ends
    products = (3 * 768 + 768 + 3072 + 768) * 2
    assert activations(gpt2, kept, "selective") == 12 * (768 * 4 + products) + layer + ends


def test_a_step_needs_the_loss_or_the_gradients():
    """Many tokens: the most there is at once comes before the backward pass; few: after it, as gradients gather."""
    gpt2 = get_spec("gpt2")
    long, short = memory.training(gpt2, 1024, 8), memory.training(gpt2, 8)
    states = long.weights + long.optimizer
    assert long.total == states + long.low_precision_weights + long.activations + long.head + long.loss
    assert short.total == short.states + short.embedding_grad
    several = memory.training(gpt2, 1024, 8, TrainingConfig(accumulate=True))
    assert several.total == long.total + long.gradients
    cpu = memory.training(gpt2, 1024, 8, TrainingConfig(cpu=True))
    held = states + cpu.low_precision_weights + cpu.activations + cpu.head + cpu.loss
    assert cpu.total == held + round(memory.HEAP_FRAGMENTATION * cpu.gradients) + memory.KERNEL_SCRATCH


def test_ranks_that_share_a_model_hold_less():
    """Measured beside the plan on two ranks in docs/memory.md."""
    llama = get_spec("llama-3.1-8b")

    def shared(**over: int) -> memory.Training:
        return memory.training(
            llama, 8192, 1, TrainingConfig(activation_checkpointing="full", parallelism=memory.Parallelism(**over))
        )

    alone, most = shared(), 80e9
    assert alone.total > most > shared(fsdp=8).total > alone.total / 8
    assert shared(fsdp=8).states == alone.states // 8
    assert shared(cp=4).states == alone.states
    assert shared(cp=4).activations == alone.activations // 4
    blocks = alone.weights - memory.gathered_outside_blocks(llama)
    norms = 4 * 2 * llama.dim * llama.n_layers
    assert shared(tp=4).weights == memory.gathered_outside_blocks(llama) + norms + (blocks - norms) // 4
    assert shared(tp=4).activations < 0.5 * alone.activations
    mixtral = get_spec("mixtral-8x7b")
    experts = mixtral.n_layers * 8 * params.mlp(mixtral.layers[0].mlp.expert, mixtral.dim)
    part = params.total(memory.Parallelism(ep=8).shard_of(mixtral))
    assert part == params.total(mixtral) - experts * 7 // 8 - mixtral.n_layers * 7 * mixtral.dim  # and routers


def test_the_loss_does_not_grow_with_the_text():
    gpt2 = get_spec("gpt2")
    grown = memory.training(gpt2, 1024, 64).loss - memory.training(gpt2, 1024, 32).loss
    assert grown == 32 * 1024 * 768 * 2 * 2  # what came in and its gradient, not the 50,257 words


@given(specs, st.integers(1, 300), st.integers(1, 8))
def test_activations_are_linear_in_tokens_and_recomputing_saves(built: Spec, context: int, batch: int):
    full = memory.training(built, context, batch)
    kept = memory.training(built, context, batch, TrainingConfig(activation_checkpointing="full"))
    assert full.activations == batch * context * memory.training(built, 1, 1).activations
    assert kept.activations < full.activations
    assert kept.states == full.states and kept.loss == full.loss


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
        model.hidden_states(torch.randint(0, model.spec.vocab, (1, tokens)))
    return sum(size for size, _ in kept.values()) / tokens


@pytest.mark.parametrize(
    "family", ["gpt1", "gpt2", "opt", "gpt_neox", "phi", "llama", "mixtral", "qwen2_moe", "olmo2", "gemma", "qwen3"]
)
@pytest.mark.parametrize("tokens", [128, 1280])  # scores written out, and the fused path
def test_activations_are_what_torch_keeps(family: str, tokens: int):
    built = FAMILIES[family](context=2048)
    model = Decoder(built)
    use_fast_kernels(model)
    measured = kept_for_backward(model, tokens)
    assert measured == pytest.approx(activations(built, ActivationConfig(4, tokens, cpu=True)), rel=0.1)


def test_plan_refuses_an_unknown_dtype():
    with pytest.raises(OneblockError, match="unknown dtype 'bf16': choose from float32"):
        plan_model(get_spec("gpt2"), dtype="bf16")
