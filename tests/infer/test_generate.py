"""The loop: each row what it would get alone, stops, limits, LongRoPE's re-reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oneblock.errors import OneblockError
from oneblock.infer.generate import Request, Sequences, check, context_limit, events, remaining_tokens
from oneblock.infer.sample import SamplingParams
from oneblock.model import Decoder
from oneblock.spec import FAMILIES, DynamicNTK, LongRope, Rope, Spec, Yarn

GREEDY = SamplingParams(temperature=0)


def random_model(spec: Spec, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(spec)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (1.0 if name.startswith(("embed", "positions")) else 0.3))
    return model


def some_prompts(vocab: int, lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def replies(model: Decoder, prompts: list[list[int]], request: Request) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for event in events(Sequences(model, prompts, 64), request, [None] * len(prompts)):
        found[event.row].append(event.id)
    return found


@torch.inference_mode()
def without_cache(model: Decoder, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_greedy_equals_alone_without_cache(name):
    model = random_model(FAMILIES[name]())
    prompts = some_prompts(model.spec.vocab, (3, 70, 1, 17))  # 70: past the small windows and chunks
    together = replies(model, prompts, Request(GREEDY, max_tokens=8))
    assert together == [without_cache(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_read_in_chunks_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and with rows whose first chunks are padding alone."""
    model = random_model(FAMILIES[name]())
    prompts = some_prompts(model.spec.vocab, (3, 90, 41))
    whole = [replies(model, some, Request(GREEDY, max_tokens=6)) for some in ([prompts[1]], prompts)]
    longest, inner = [], model.hidden_states

    def hidden_states(ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        longest.append(ids.numel())
        return inner(ids, **rest)

    monkeypatch.setattr("oneblock.infer.generate.CHUNK", 24)
    monkeypatch.setattr(model, "hidden_states", hidden_states)
    assert [replies(model, some, Request(GREEDY, max_tokens=6)) for some in ([prompts[1]], prompts)] == whole
    scaled = {type(layer.attn.rope.scaling) for layer in model.spec.pattern if layer.attn.rope}
    assert max(longest) <= 24 or scaled & {LongRope, DynamicNTK}


def test_rows_that_end_leave_and_the_others_go_on():
    model = random_model(FAMILIES["gemma2"]())
    prompts = some_prompts(model.spec.vocab, (5, 80, 9))
    alone = [without_cache(model, prompt, 12) for prompt in prompts]
    stop = alone[1][3]
    together = replies(model, prompts, Request(GREEDY, max_tokens=12, stop_ids=frozenset([stop])))
    for ids, expected in zip(together, alone, strict=True):
        end = expected.index(stop) + 1 if stop in expected else 12
        assert ids == expected[:end]


def test_a_row_at_its_limit_leaves_before_its_positions_run_out():
    """The long prompt may go on for 4 tokens only; learned positions have no row for a fifth."""
    model = random_model(FAMILIES["gpt2"](context=32))
    prompts = some_prompts(model.spec.vocab, (28, 2))
    found = replies(model, prompts, Request(GREEDY, max_tokens=20))
    assert [len(ids) for ids in found] == [4, 20]
    assert found[1] == without_cache(model, prompts[1], 20)


def test_sampled_rows_equal_alone():
    model = random_model(FAMILIES["qwen3"]())
    prompts = some_prompts(model.spec.vocab, (4, 11, 2))
    sampling = SamplingParams(0.8, top_p=0.9, repetition_penalty=1.2)
    together = replies(model, prompts, Request(sampling, max_tokens=10, seeds=(5, 6, 7)))
    for row, seed in enumerate((5, 6, 7)):
        alone = replies(model, prompts[row : row + 1], Request(sampling, max_tokens=10, seeds=(seed,)))
        assert alone[0] == together[row]


def test_seeds():
    model = random_model(FAMILIES["llama"]())
    prompts = some_prompts(model.spec.vocab, (4,))
    flat = SamplingParams(temperature=50.0)

    def run(*seeds: int) -> list[list[int]]:
        return replies(model, prompts, Request(flat, max_tokens=12, seeds=seeds))

    assert run(1) == run(1) != run(2)
    assert run() != run(), "no seed: something new each time"


def test_logprobs_are_those_of_the_full_model():
    model = random_model(FAMILIES["llama"]())
    [prompt] = some_prompts(model.spec.vocab, (6,))
    request = Request(SamplingParams(0.7, top_k=5), max_tokens=5, seeds=(3,), logprobs=3)
    found = list(events(Sequences(model, [prompt], 16), request, [None]))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + [e.id for e in found]]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for i, event in enumerate(found):
        assert event.logprob == pytest.approx(expected[i, event.id].item(), abs=1e-4)
        assert [t for t, _ in event.top] == expected[i].topk(3).indices.tolist()
        assert [p for _, p in event.top] == pytest.approx(expected[i].topk(3).values.tolist(), abs=1e-4)


# ------------------------------------------------------------------ LongRoPE


def longrope() -> Spec:
    short, long = tuple(1.0 + 0.1 * i for i in range(8)), tuple(2.0 + i for i in range(8))
    return FAMILIES["phi3"](
        head_dim=16, rope=Rope(scaling=LongRope(short, long, original_context=16, attention_factor=1.1))
    )


@pytest.mark.parametrize("lengths", [(10,), (16,), (17,), (10, 14, 20, 3)], ids=str)
def test_longrope_reads_everything_again_when_its_angles_change(lengths):
    model = random_model(longrope())
    prompts = some_prompts(model.spec.vocab, lengths)
    found = replies(model, prompts, Request(GREEDY, max_tokens=14))
    assert found == [without_cache(model, prompt, 14) for prompt in prompts]


# ------------------------------------------------------------------ another text in the same cache


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "longrope"])
def test_a_second_text_reuses_what_both_begin_with(name):
    model = random_model(longrope() if name == "longrope" else FAMILIES[name]())
    first, second, third = some_prompts(model.spec.vocab, (12, 90, 6))
    texts, request = Sequences(model, [first], 16), Request(GREEDY, max_tokens=5)
    reply = [e.id for e in events(texts, request, [None])]
    longer = first + reply + second
    for prompt in (longer, first + reply[:2] + third, first, first, third):
        texts.replace(prompt)
        assert texts.cache.length < len(prompt)
        found = [e.id for e in events(texts, request, [None])]
        assert found == without_cache(model, prompt, 5)


def test_the_common_part_is_not_fed_again():
    model = random_model(FAMILIES["llama"]())
    first, more = some_prompts(model.spec.vocab, (12, 8))
    texts = Sequences(model, [first], 64)
    reply = [e.id for e in events(texts, Request(GREEDY, max_tokens=5), [None])]
    texts.replace(first + reply + more)
    assert texts.cache.length == 12 + 4, "all but the last token of the reply"


# ------------------------------------------------------------------ limits and wrong requests


def test_the_context_is_the_limit():
    spec = FAMILIES["llama"](context=32)
    assert remaining_tokens(spec, [1] * 30, 100) == 2
    assert remaining_tokens(spec, [1] * 30, None) == 2
    assert remaining_tokens(spec, [1] * 10, 5) == 5
    for n in (32, 40):
        with pytest.raises(OneblockError, match=rf"{n} tokens.*32"):
            remaining_tokens(spec, [1] * n, 1)


def test_context_of_scaled_rotations():
    assert context_limit(FAMILIES["llama"](context=32, rope=Rope(scaling=DynamicNTK(2.0, 32)))) is None
    assert context_limit(FAMILIES["llama"](context=32, rope=Rope(scaling=Yarn(4.0, 32)))) == 128
    assert context_limit(FAMILIES["llama"](context=256, rope=Rope(scaling=Yarn(4.0, 32)))) == 256
    assert context_limit(FAMILIES["gpt2"](context=40)) == 40


@pytest.mark.parametrize("ids", [[], [-1], [64], [1, 2, 10**12], [1.0], ["a"], [True]], ids=str)
def test_wrong_ids_are_refused(ids):
    with pytest.raises(OneblockError, match=r"vocabulary.*63|empty"):
        check(FAMILIES["llama"](vocab=64), [[1], ids], Request())


def test_wrong_bias_and_max_tokens_are_refused():
    with pytest.raises(OneblockError, match="logit_bias for 64"):
        check(FAMILIES["llama"](vocab=64), [[1]], Request(SamplingParams(logit_bias={64: 1.0})))
    for n in (0, -5):
        with pytest.raises(OneblockError, match="max_tokens"):
            Request(max_tokens=n)


def test_logits_that_are_no_numbers_are_reported():
    model = random_model(FAMILIES["llama"]())
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(OneblockError, match="dtype"):
        replies(model, [[1, 2]], Request(max_tokens=2))
