"""Compiled decode steps give the same tokens as eager ones, and compile once."""

from __future__ import annotations

import pytest
import torch

from oneblock.infer.llm import LLM
from oneblock.kernels.build import has_compiler
from oneblock.kernels.compiled_step import CompiledStep, is_worth_compiling
from oneblock.model import Decoder, init_weights
from oneblock.spec import Rope, get_spec

pytestmark = [
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own, at the first compilation
]
OPTIONS = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}


def build_llm(family: str, **sizes: object) -> LLM:
    model = Decoder(get_spec(family, **{"vocab": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "context": 512, **sizes}))
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that generation does not repeat itself
    return LLM(model.eval())


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_same_tokens_from_one_program() -> None:
    """As the cache grows, past the window, and when sequences leave the batch."""
    llm = build_llm("gemma3", window=24)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    stop = llm.generate(prompts, **OPTIONS)[1].ids[20]
    single, batched = llm.generate(prompts[0], **OPTIONS), llm.generate(prompts, **OPTIONS, stop_ids=[stop])
    assert len({len(reply.ids) for reply in batched}) > 1, "no sequence left the batch"
    torch._dynamo.reset()
    llm.compile = "on"
    before = compiled_graphs()
    assert llm.generate(prompts[0], **OPTIONS).ids == single.ids
    assert compiled_graphs() == before + 1
    again = llm.generate(prompts, **OPTIONS, stop_ids=[stop])
    assert [reply.ids for reply in again] == [reply.ids for reply in batched]
    llm.generate([1, 2, 3, 4], **OPTIONS)
    assert compiled_graphs() <= before + 3  # batch of one, padded batch, unpadded batch


def test_models_of_one_shape_have_separate_programs() -> None:
    for theta in (10.0, 10_000.0):
        llm, results = build_llm("llama", rope=Rope(theta)), []
        for llm.compile in ("off", "on"):
            results.append(llm.generate([1, 2, 3], max_tokens=40, temperature=0, ignore_eos=True).ids)
        assert results[0] == results[1]


def test_int8_kv_cache() -> None:
    llm = build_llm("gemma3", window=24)
    llm.kv_cache_dtype = "int8"
    results = []
    for llm.compile in ("off", "on"):
        results.append(llm.generate([[1, 2, 3], [4, 5, 6, 7, 8]], **OPTIONS, top_logprobs=1))
    assert [r.ids for r in results[0]] == [r.ids for r in results[1]]
    assert results[0][0].logprobs == pytest.approx(results[1][0].logprobs, abs=0.01)


def test_auto_compiles_for_many_tokens() -> None:
    cpu = torch.device("cpu")
    llama = get_spec("llama-3.2-1b")
    assert not is_worth_compiling(llama, 256, cpu)
    assert is_worth_compiling(llama, 100_000, cpu)
    llm = build_llm("llama")
    assert llm.compile_step(256) is None
    assert isinstance(llm.compile_step(10**6), CompiledStep)
    llm.compile = "off"
    assert llm.compile_step(10**6) is None


def test_a_missing_compiler_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneblock.infer.llm.has_compiler", lambda: False)
    llm = build_llm("llama")
    llm.compile = "on"
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler was found: steps are not compiled"):
        assert len(llm.generate([1, 2], max_tokens=3, ignore_eos=True).ids) == 3
