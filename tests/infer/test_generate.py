"""The decode loop: batched == unbatched, cached == full, stop conditions, context limits, LongRoPE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oneblock.errors import OneblockError
from oneblock.infer.generate import (
    Request,
    Sequences,
    TokenOutput,
    check_request,
    context_limit,
    generate_tokens,
    remaining_tokens,
    start_reply,
)
from oneblock.infer.options import SamplingParams
from oneblock.model import Decoder
from oneblock.spec import FAMILIES, DynamicNTK, LongRope, Rope, Spec, Yarn, get_spec

GREEDY = SamplingParams(temperature=0)


def random_model(spec: Spec, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (1.0 if name.startswith(("embed", "positions")) else 0.3))
    return model


def random_prompts(vocab: int, lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def generate_outputs(sequences: Sequences, request: Request) -> list[TokenOutput]:
    replies = [start_reply(sequences.model.spec, row, request) for row in sequences.rows]
    return list(generate_tokens(sequences, request, replies))


def generate_ids(model: Decoder, prompts: list[list[int]], request: Request) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for output in generate_outputs(Sequences(model, prompts, 64), request):
        rows[output.row].append(output.id)
    return rows


@torch.inference_mode()
def generate_without_cache(model: Decoder, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_greedy_equals_unbatched_without_cache(name):
    model = random_model(FAMILIES[name]())
    prompts = random_prompts(model.spec.vocab, (3, 70, 1, 17))  # 70: past the small windows and chunks
    together = generate_ids(model, prompts, Request(GREEDY, max_tokens=8))
    assert together == [generate_without_cache(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_chunked_prefill_equals_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unbatched, and in a batch where the first chunks of some rows are all padding."""
    model = random_model(FAMILIES[name]())
    prompts = random_prompts(model.spec.vocab, (3, 90, 41))
    expected = [generate_ids(model, batch, Request(GREEDY, max_tokens=6)) for batch in ([prompts[1]], prompts)]
    longest, inner = [], model.hidden_states

    def hidden_states(ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        longest.append(ids.numel())
        return inner(ids, **rest)

    monkeypatch.setattr("oneblock.infer.generate.PREFILL_CHUNK", 24)
    monkeypatch.setattr(model, "hidden_states", hidden_states)
    assert [generate_ids(model, batch, Request(GREEDY, max_tokens=6)) for batch in ([prompts[1]], prompts)] == expected
    scaled = {type(layer.attn.rope.scaling) for layer in model.spec.pattern if layer.attn.rope}
    assert max(longest) <= 24 or scaled & {LongRope, DynamicNTK}


def test_finished_sequences_leave_the_batch():
    model = random_model(FAMILIES["gemma2"]())
    prompts = random_prompts(model.spec.vocab, (5, 80, 9))
    alone = [generate_without_cache(model, prompt, 12) for prompt in prompts]
    stop = alone[1][3]
    together = generate_ids(model, prompts, Request(GREEDY, max_tokens=12, stop_ids=frozenset([stop])))
    for ids, expected in zip(together, alone, strict=True):
        end = expected.index(stop) + 1 if stop in expected else 12
        assert ids == expected[:end]


def test_a_sequence_stops_at_the_context_limit():
    """The context leaves room for 4 tokens after the long prompt; learned positions have no row for a fifth."""
    model = random_model(FAMILIES["gpt2"](context=32))
    prompts = random_prompts(model.spec.vocab, (28, 2))
    generated = generate_ids(model, prompts, Request(GREEDY, max_tokens=20))
    assert [len(ids) for ids in generated] == [4, 20]
    assert generated[1] == generate_without_cache(model, prompts[1], 20)


def test_batched_samples_equal_unbatched():
    model = random_model(FAMILIES["qwen3"]())
    prompts = random_prompts(model.spec.vocab, (4, 11, 2))
    sampling = SamplingParams(0.8, top_p=0.9, repetition_penalty=1.2)
    together = generate_ids(model, prompts, Request(sampling, max_tokens=10, seeds=(5, 6, 7)))
    for row, seed in enumerate((5, 6, 7)):
        alone = generate_ids(model, prompts[row : row + 1], Request(sampling, max_tokens=10, seeds=(seed,)))
        assert alone[0] == together[row]


def test_seeds_reproduce_samples():
    model = random_model(FAMILIES["llama"]())
    prompts = random_prompts(model.spec.vocab, (4,))
    flat = SamplingParams(temperature=50.0)

    def run(*seeds: int) -> list[list[int]]:
        return generate_ids(model, prompts, Request(flat, max_tokens=12, seeds=seeds))

    assert run(1) == run(1) != run(2)
    assert run() != run(), "without a seed each call differs"


def test_logprobs_equal_those_of_a_full_forward_pass():
    model = random_model(FAMILIES["llama"]())
    [prompt] = random_prompts(model.spec.vocab, (6,))
    request = Request(SamplingParams(0.7, top_k=5), max_tokens=5, seeds=(3,), top_logprobs=3)
    outputs = generate_outputs(Sequences(model, [prompt], 16), request)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + [e.id for e in outputs]]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for i, output in enumerate(outputs):
        assert output.logprob == pytest.approx(expected[i, output.id].item(), abs=1e-4)
        assert [t for t, _ in output.top] == expected[i].topk(3).indices.tolist()
        assert [p for _, p in output.top] == pytest.approx(expected[i].topk(3).values.tolist(), abs=1e-4)


# ------------------------------------------------------------------ LongRoPE


def longrope() -> Spec:
    short, long = tuple(1.0 + 0.1 * i for i in range(8)), tuple(2.0 + i for i in range(8))
    return FAMILIES["phi3"](
        head_dim=16, rope=Rope(scaling=LongRope(short, long, original_context=16, attention_factor=1.1))
    )


@pytest.mark.parametrize("lengths", [(10,), (16,), (17,), (10, 14, 20, 3)], ids=str)
def test_longrope_recomputes_the_cache_when_its_angles_switch(lengths):
    model = random_model(longrope())
    prompts = random_prompts(model.spec.vocab, lengths)
    generated = generate_ids(model, prompts, Request(GREEDY, max_tokens=14))
    assert generated == [generate_without_cache(model, prompt, 14) for prompt in prompts]


# ------------------------------------------------------------------ reuse of the KV cache


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "longrope"])
def test_replaced_prompts_reuse_the_common_prefix(name):
    model = random_model(longrope() if name == "longrope" else FAMILIES[name]())
    first, second, third = random_prompts(model.spec.vocab, (12, 90, 6))
    sequences, request = Sequences(model, [first], 16), Request(GREEDY, max_tokens=5)
    reply = [e.id for e in generate_outputs(sequences, request)]
    longer = first + reply + second
    for prompt in (longer, first + reply[:2] + third, first, first, third):
        sequences.replace_prompt(prompt)
        assert sequences.cache.length < len(prompt)
        generated = [e.id for e in generate_outputs(sequences, request)]
        assert generated == generate_without_cache(model, prompt, 5)


def test_the_common_prefix_is_not_fed_again():
    model = random_model(FAMILIES["llama"]())
    first, more = random_prompts(model.spec.vocab, (12, 8))
    sequences = Sequences(model, [first], 64)
    reply = [e.id for e in generate_outputs(sequences, Request(GREEDY, max_tokens=5))]
    sequences.replace_prompt(first + reply + more)
    assert sequences.cache.length == 12 + 4, "all but the last token of the reply"


# ------------------------------------------------------------------ limits and refused requests


def test_remaining_tokens_of_the_context():
    spec = FAMILIES["llama"](context=32)
    assert remaining_tokens(spec, [1] * 30, 100) == 2
    assert remaining_tokens(spec, [1] * 30, None) == 2
    assert remaining_tokens(spec, [1] * 10, 5) == 5
    for n in (32, 40):
        with pytest.raises(OneblockError, match=rf"{n} tokens.*32"):
            remaining_tokens(spec, [1] * n, 1)


def test_context_limit_with_rope_scaling():
    assert context_limit(FAMILIES["llama"](context=32, rope=Rope(scaling=DynamicNTK(2.0, 32)))) is None
    assert context_limit(FAMILIES["llama"](context=32, rope=Rope(scaling=Yarn(4.0, 32)))) == 128
    assert context_limit(FAMILIES["llama"](context=256, rope=Rope(scaling=Yarn(4.0, 32)))) == 256
    assert context_limit(FAMILIES["gpt2"](context=40)) == 40


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.3-70b"])
def test_context_limit_of_llama3_scaling_is_max_position_embeddings(name: str) -> None:
    assert context_limit(get_spec(name)) == 131_072


@pytest.mark.parametrize("ids", [[], [-1], [64], [1, 2, 10**12], [1.0], ["a"], [True]], ids=str)
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(OneblockError, match=r"vocabulary.*63|empty"):
        check_request(FAMILIES["llama"](vocab=64), [[1], ids], Request())


def test_logit_bias_and_max_tokens_out_of_range_are_refused():
    with pytest.raises(OneblockError, match="logit_bias for 64"):
        check_request(FAMILIES["llama"](vocab=64), [[1]], Request(SamplingParams(logit_bias={64: 1.0})))
    for n in (0, -5, 1.5, True, float("nan"), 2**31):
        with pytest.raises(OneblockError, match="max_tokens"):
            Request(max_tokens=n)  # pyright: ignore[reportArgumentType]


def test_nan_logits_are_one_line_errors():
    model = random_model(FAMILIES["llama"]())
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(OneblockError, match="dtype"):
        generate_ids(model, [[1, 2]], Request(max_tokens=2))
