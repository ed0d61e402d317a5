"""Speculative decoding: fewer forward passes, the same output distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.infer.chat import Conversation
from oneblock.infer.llm import LLM, load
from oneblock.infer.speculate import DraftTokens, NgramDrafter, rejection_sample
from oneblock.model import Decoder, init_weights
from oneblock.spec import get_spec


def random_llm(family: str = "llama", seed: int = 0, **sizes: int) -> LLM:
    model = Decoder(get_spec(family, **{"vocab": 24, "dim": 32, "n_layers": 2, "n_heads": 2, "context": 256, **sizes}))
    init_weights(model, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return LLM(model.eval())


def test_ngram_drafter_proposes_the_latest_continuation() -> None:
    drafter = NgramDrafter()
    assert drafter.propose([1, 2, 3], 4) == DraftTokens([])
    assert drafter.propose([1, 2, 3, 9, 1, 2, 3], 2) == DraftTokens([9, 1])
    assert drafter.propose([1, 2, 3, 9, 1, 2, 3, 7, 2, 3], 3) == DraftTokens([7, 2, 3])  # the latest occurrence
    assert drafter.propose([1, 2, 3, 9, 1, 2, 3, 7, 2, 3, 5, 5], 3) == DraftTokens([])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("drafter", ["ngram", "draft model", "the model itself"])
def test_greedy_replies_are_unchanged(family: str, drafter: str) -> None:
    """Beyond a sliding window, with stop ids, penalties and logprobs."""
    llm = random_llm(family, **({"window": 16} if family == "gemma3" else {}))
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    for how in ({}, {"stop_ids": [5]}, {"repetition_penalty": 1.3, "top_logprobs": 2}):
        asked = {"max_tokens": 120, "temperature": 0, "ignore_eos": True, **how}
        llm.set_speculative_decoding(0)
        plain = llm.generate(prompt, **asked)
        draft_model = {"ngram": None, "draft model": random_llm(family, 1), "the model itself": llm}[drafter]
        llm.set_speculative_decoding(5, draft_model)
        completion = llm.generate(prompt, **asked)
        assert completion.ids == plain.ids
        assert completion.finish_reason == plain.finish_reason
        assert completion.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
        if drafter == "the model itself" and not how and family != "gemma3":
            assert llm.speculative_stats.accepted == llm.speculative_stats.drafted > 90
        assert family == "gemma3" or llm.speculative_stats.drafted > 0


def test_rejected_tokens_leave_the_cache(tmp_path: Path) -> None:
    """A reply that ends amid draft tokens: the prompt cache on disk holds prompt and reply only."""
    llm, how = random_llm(), {"temperature": 0, "ignore_eos": True}
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    plain = llm.generate(prompt, max_tokens=40, **how).ids
    llm.prompt_cache = tmp_path / "kept"
    for guesses, n in ((5, 17), (5, 26), (0, 40)):
        llm.set_speculative_decoding(guesses, llm if guesses else None)
        assert llm.generate(prompt, max_tokens=n, **how).ids == plain[:n]
        with safe_open(llm.prompt_cache, "pt") as file:
            ids = file.get_tensor("ids").tolist()
            assert len(ids) == file.get_tensor("keys.0.0").shape[2]
        assert ids == [*prompt, *plain][: len(ids)]
        assert len(ids) >= len(prompt) + n - 7


def test_conversations_use_speculative_decoding(data: Path) -> None:
    replies = []
    for guesses in (0, 4):
        llm = load(data / "weights" / "stories260k")
        llm.set_speculative_decoding(guesses)
        conversation = Conversation(llm, llm.build_request(max_tokens=40, temperature=0.0))
        replies.append(
            ["".join(conversation.stream_reply(line)) for line in ("Once upon a time", "Then they played and played")]
        )
        assert (llm.speculative_stats.drafted > 0) == (guesses > 0)
    assert replies[0] == replies[1]


def test_samples_match_the_models_distribution() -> None:
    """Chi-square over the first two tokens of many replies, with a poor draft model and with n-grams."""
    llm, draft = random_llm(vocab=8), random_llm(vocab=8, seed=3)
    prompt = [1, 2, 3, 1, 2]
    with torch.no_grad():
        first = llm.model(torch.tensor([prompt]))[0, -1].softmax(-1)
        second = torch.stack([llm.model(torch.tensor([[*prompt, i]]))[0, -1].softmax(-1) for i in range(8)])
    expected = (first[:, None] * second).flatten()
    runs = 700
    for by in (draft, None):
        llm.set_speculative_decoding(3, by)
        counts = torch.zeros(64)
        for seed in range(runs):
            a, b = llm.generate(prompt, max_tokens=2, temperature=1, seed=seed, ignore_eos=True).ids
            counts[a * 8 + b] += 1
        assert llm.speculative_stats.drafted > 0
        common = expected * runs >= 5
        rare = torch.stack([counts[~common].sum(), expected[~common].sum() * runs])
        observed, theory = torch.cat([counts[common], rare[:1]]), torch.cat([expected[common] * runs, rare[1:]])
        chi = ((observed - theory).square() / theory.clamp(min=1e-9)).sum().item()
        free = int(common.sum())
        assert chi < free + 4 * (2 * free) ** 0.5, (chi, free)  # four standard deviations of chi-square


def test_rejection_sampling_draws_from_the_target_distribution() -> None:
    torch.manual_seed(0)
    p, q = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    generator, n = torch.Generator().manual_seed(0), 20_000
    drawn = torch.multinomial(q, n, replacement=True).tolist()
    frequencies = (
        torch.bincount(torch.tensor([rejection_sample(p, id, q, generator)[0] for id in drawn]), minlength=4) / n
    )
    torch.testing.assert_close(frequencies, p, atol=0.012, rtol=0)
    sure = torch.bincount(torch.tensor([rejection_sample(p, 2, None, generator)[0] for _ in range(n)]), minlength=4) / n
    torch.testing.assert_close(sure, p, atol=0.012, rtol=0)


def test_draft_models_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(OneblockError, match="the draft model's vocabulary has 30 tokens and the model's 24"):
        random_llm().set_speculative_decoding(3, random_llm(vocab=30))


def test_the_command_prints_the_acceptance_rate(data, capsys: pytest.CaptureFixture[str]) -> None:
    stories = str(data / "weights" / "stories260k")
    argv = ["generate", stories, "--prompt", "Once upon a time", "--max-tokens", "60", "--temperature", "0"]
    assert main(argv) == 0
    plain = capsys.readouterr().out
    assert main([*argv, "--num-speculative-tokens", "4", "--draft-model", stories]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert "draft tokens accepted (100%)" in err
    assert main([*argv, "--draft-model", stories]) == 1
    assert "--draft-model has no effect without --num-speculative-tokens" in capsys.readouterr().err
