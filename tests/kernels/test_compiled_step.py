"""A compiled step writes what an eager one writes, and is made once."""

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
HOW = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}


def writer(family: str, **sizes: object) -> LLM:
    model = Decoder(get_spec(family, **{"vocab": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "context": 512, **sizes}))
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that texts do not repeat themselves
    return LLM(model.eval())


def made() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_it_writes_the_same_and_is_made_once() -> None:
    """Past the cache's first size, past a window, in batches that lose rows."""
    llm = writer("gemma3", window=24)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    stop = llm.generate(prompts, **HOW)[1].ids[20]
    alone, together = llm.generate(prompts[0], **HOW), llm.generate(prompts, **HOW, stop_ids=[stop])
    assert len({len(reply.ids) for reply in together}) > 1, "no row left the batch"
    torch._dynamo.reset()
    llm.compile = "on"
    before = made()
    assert llm.generate(prompts[0], **HOW).ids == alone.ids
    assert made() == before + 1
    again = llm.generate(prompts, **HOW, stop_ids=[stop])
    assert [reply.ids for reply in again] == [reply.ids for reply in together]
    llm.generate([1, 2, 3, 4], **HOW)
    assert made() <= before + 3  # one text, texts padded, texts of one length


def test_models_of_one_shape_have_programs_of_their_own() -> None:
    for theta in (10.0, 10_000.0):
        llm, found = writer("llama", rope=Rope(theta)), []
        for llm.compile in ("off", "on"):
            found.append(llm.generate([1, 2, 3], max_tokens=40, temperature=0, ignore_eos=True).ids)
        assert found[0] == found[1]


def test_it_keeps_a_cache_of_8_bits() -> None:
    llm = writer("gemma3", window=24)
    llm.kv_cache_dtype = "int8"
    found = []
    for llm.compile in ("off", "on"):
        found.append(llm.generate([[1, 2, 3], [4, 5, 6, 7, 8]], **HOW, top_logprobs=1))
    assert [r.ids for r in found[0]] == [r.ids for r in found[1]]
    assert found[0][0].logprobs == pytest.approx(found[1][0].logprobs, abs=0.01)


def test_auto_compiles_where_many_tokens_are_to_come() -> None:
    cpu = torch.device("cpu")
    llama = get_spec("llama-3.2-1b")
    assert not is_worth_compiling(llama, 256, cpu)
    assert is_worth_compiling(llama, 100_000, cpu)
    llm = writer("llama")
    assert llm.compile_step(256) is None
    assert isinstance(llm.compile_step(10**6), CompiledStep)
    llm.compile = "off"
    assert llm.compile_step(10**6) is None


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneblock.infer.llm.has_compiler", lambda: False)
    llm = writer("llama")
    llm.compile = "on"
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler was found: steps are not compiled"):
        assert len(llm.generate([1, 2], max_tokens=3, ignore_eos=True).ids) == 3
