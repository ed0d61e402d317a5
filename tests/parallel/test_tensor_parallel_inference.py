"""Tensor-parallel inference on two ranks equals inference on one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from launch import RankOutput, run_ranks

from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM, load
from oneblock.kernels.linear import COLUMNS, ROWS, slice_linear
from oneblock.model import Decoder, init_weights
from oneblock.parallel.process_group import ProcessGroup
from oneblock.parallel.tensor_parallel import check_divisibility
from oneblock.quant.formats import quantize_int4
from oneblock.quant.linear import QuantizedLinear
from oneblock.quant.quantize import QuantConfig, quantize
from oneblock.spec import get_spec

SIZES = {"vocab": 64, "dim": 64, "n_layers": 2, "n_heads": 4, "context": 64}
MODELS: dict[str, dict[str, int]] = {
    "llama": {},
    "gpt2": {},
    "gemma": {"n_kv_heads": 1},  # both ranks share it
    "mixtral": {"n_kv_heads": 2, "hidden_dim": 64},
    "gpt_oss": {"n_kv_heads": 2, "hidden_dim": 64},  # sinks, and experts with biases
    "qwen2_moe": {"hidden_dim": 64},  # shared experts
}


def save_model(path: Path, family: str, bits: QuantConfig | None = None) -> LLM:
    model = Decoder(get_spec(family, **SIZES, **MODELS[family]))
    init_weights(model, 0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    llm = LLM((model if bits is None else quantize(model, bits)).eval())
    llm.save(path)
    return llm


def generate_on_two_ranks(folder: Path, *argv: str) -> list[RankOutput]:
    return run_ranks([sys.executable, "-m", "oneblock", "generate", str(folder), *argv], 2, folder / "logs")


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        *((family, None) for family in MODELS),
        *(("gpt_oss", bits) for bits in (QuantConfig(8), QuantConfig(4, 32), QuantConfig(fp8=True))),
        ("llama", QuantConfig(4, 32)),
    ],
)
def test_two_ranks_generate_what_one_does(family: str, bits: QuantConfig | None, tmp_path: Path) -> None:
    llm = save_model(tmp_path, family, bits)
    expected = llm.generate([1, 2, 3], max_tokens=24, temperature=0.7, seed=5, ignore_eos=True)
    argv = ["--ids", "1", "2", "3", "--max-tokens", "24", "--ignore-eos", "--json"]
    first, second = generate_on_two_ranks(tmp_path, *argv, "--temperature", "0.7", "--seed", "5")
    assert first.status == second.status == 0, first.err + second.err
    assert second.out == ""
    reply = json.loads(first.out)
    assert reply["ids"] == expected.ids
    assert reply["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "x", "--output", "y"), "with torchrun generate takes one prompt"),
        (("--prompt-cache", "c"), "--prompt-cache holds the KV cache of one process"),
    ],
)
def test_every_rank_reports_unsupported_flags(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    for rank in generate_on_two_ranks(tmp_path, "--ids", "1", "2", *flags):
        assert rank.status == 1
        assert message in rank.err


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        (
            "llama",
            {"dim": 96, "n_heads": 6, "n_kv_heads": 3},
            "number of KV heads 3 is not divisible by tp=2; use tp=1 or 3",
        ),
        ("llama", {"n_heads": 1, "n_kv_heads": 1}, "number of attention heads 1 is not divisible by tp=2; use tp=1"),
        ("mixtral", {"hidden_dim": 33}, "MLP intermediate size 33 is not divisible by tp=2; use tp=1, 3, 11 or 33"),
        ("olmo2", {}, "tp does not support QK norms over all heads"),
    ],
)
def test_sizes_that_tp_does_not_divide_are_refused(family: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(OneblockError, match=message):
        check_divisibility(get_spec(family, **{**SIZES, "n_layers": 1, **sizes}), 2)


def test_quantized_layers_are_sliced_between_tiles_and_groups() -> None:
    layer = QuantizedLinear(48, 128, 64)
    for dim, part, message in (
        (ROWS, slice(0, 24), "24 output features .* multiple of its tile of 16"),
        (COLUMNS, slice(32, 96), "64 input features .* multiple of its group of 64"),
    ):
        with pytest.raises(OneblockError, match=message):
            slice_linear(layer, dim, part)
    layer.set_weight(*quantize_int4(torch.randn(48, 128), 64))
    assert torch.equal(slice_linear(layer, ROWS, slice(16, 48)).dequantize(), layer.dequantize()[16:])
    assert torch.equal(slice_linear(layer, COLUMNS, slice(64, 128)).dequantize(), layer.dequantize()[:, 64:])


def test_a_rank_holds_only_its_shard(tmp_path: Path) -> None:
    """Shards are copies, so that the pages of a memory-mapped file can be freed."""
    full = save_model(tmp_path, "llama").model.blocks[0]
    shard = load(tmp_path, ranks=ProcessGroup(1, 2)).model.blocks[0]
    sizes = [sum(p.nbytes for p in block.parameters() if p.dim() > 1) for block in (shard, full)]
    assert sizes[0] * 2 == sizes[1]
    for p in shard.parameters():
        assert p.dim() == 1 or p.untyped_storage().nbytes() == p.nbytes
