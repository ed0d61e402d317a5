"""Moving weights to huge pages keeps them equal and unmaps their file."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

import oneblock
from oneblock.infer.llm import LLM
from oneblock.kernels.huge_pages import move_to_huge_pages
from oneblock.model import Decoder, init_weights
from oneblock.quant.quantize import QuantConfig, quantize
from oneblock.spec import get_spec


def small(family: str) -> Decoder:
    model = Decoder(get_spec(family, vocab=64, dim=64, n_layers=2, n_heads=2, context=64))
    init_weights(model, 0)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("bits", [None, QuantConfig(8), QuantConfig(4, 32)], ids=["plain", "8", "4"])
def test_moved_weights_are_the_same_parameters_with_the_same_values(family: str, bits: QuantConfig | None) -> None:
    model = small(family)
    if bits:
        quantize(model, bits)
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        before = model(ids)
    tensors = {name: (x, x.data_ptr()) for name, x in model.named_parameters()}
    buffers = {name: weakref.ref(x) for name, x in model.named_buffers()}
    move_to_huge_pages(model)
    for name, x in model.named_parameters():
        assert x is tensors[name][0], "the parameter object was replaced"
        assert x.data_ptr() != tensors[name][1]
    gc.collect()
    assert not any(ref() is not None for ref in buffers.values())
    with torch.no_grad():
        assert torch.equal(model(ids), before)


def test_a_checkpoint_file_is_unmapped_once_tokens_repay_the_copy(tmp_path: Path) -> None:
    LLM(small("llama")).save(tmp_path / "model")
    llm = oneblock.load(tmp_path / "model")

    def mapped() -> bool:
        return "model.safetensors" in Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").exists() or not mapped():
        pytest.skip("no memory-mapped files on this platform")
    first = llm.generate([1, 2, 3], max_tokens=20, temperature=0, ignore_eos=True).ids
    assert mapped(), "20 tokens do not repay the copy"
    again = llm.generate([1, 2, 3], max_tokens=None, temperature=0, ignore_eos=True).ids
    assert again[:20] == first
    assert mapped()
    llm.generate([1, 2, 3], max_tokens=40, temperature=0, ignore_eos=True)
    gc.collect()
    assert not mapped()
