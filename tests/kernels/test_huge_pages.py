"""Weights in large pages are the same weights, and let go of the memory they were in."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

import oneblock
from oneblock.infer.llm import LLM
from oneblock.kernels.huge_pages import settle
from oneblock.model import Decoder, init_weights
from oneblock.quant.quantize import QuantConfig, quantize
from oneblock.spec import get_spec


def small(family: str) -> Decoder:
    model = Decoder(get_spec(family, vocab=64, dim=64, n_layers=2, n_heads=2, context=64))
    init_weights(model, 0)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("bits", [None, QuantConfig(8), QuantConfig(4, 32)], ids=["plain", "8", "4"])
def test_the_same_model_in_other_memory(family: str, bits: QuantConfig | None) -> None:
    model = small(family)
    if bits:
        quantize(model, bits)
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        before = model(ids)
    held = {name: (x, x.data_ptr()) for name, x in model.named_parameters()}
    buffers = {name: weakref.ref(x) for name, x in model.named_buffers()}
    settle(model)
    for name, x in model.named_parameters():
        assert x is held[name][0], "another parameter"
        assert x.data_ptr() != held[name][1]
    gc.collect()
    assert not any(ref() is not None for ref in buffers.values())
    with torch.no_grad():
        assert torch.equal(model(ids), before)


def test_a_files_memory_is_let_go(tmp_path: Path) -> None:
    LLM(small("llama")).save(tmp_path / "model")
    llm = oneblock.load(tmp_path / "model")

    def mapped() -> bool:
        return "model.safetensors" in Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").exists() or not mapped():
        pytest.skip("files are not mapped here")
    first = llm.generate([1, 2, 3], max_tokens=20, temperature=0, ignore_eos=True).ids
    assert mapped(), "a short reply does not repay the copy"
    again = llm.generate([1, 2, 3], max_tokens=None, temperature=0, ignore_eos=True).ids
    assert again[:20] == first
    assert mapped()
    llm.generate([1, 2, 3], max_tokens=40, temperature=0, ignore_eos=True)  # a model that is used often repays it
    gc.collect()
    assert not mapped()
