"""Two ranks write what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM, load
from oneblock.model import Decoder, init_weights
from oneblock.parallel.inference_tp import check, part
from oneblock.parallel.process_group import Ranks
from oneblock.quant.formats import quantize_int4
from oneblock.quant.linear import QuantizedLinear
from oneblock.quant.quantize import QuantConfig, quantize
from oneblock.spec import Spec, get_spec

SIZES = {"vocab": 64, "dim": 64, "n_layers": 2, "n_heads": 4, "context": 64}
MODELS: dict[str, dict[str, int]] = {
    "llama": {},
    "gpt2": {},
    "gemma": {"n_kv_heads": 1},  # one that both ranks share
    "mixtral": {"n_kv_heads": 2, "hidden_dim": 64},
    "gpt_oss": {"n_kv_heads": 2, "hidden_dim": 64},  # sinks, and experts with biases
    "qwen2_moe": {"hidden_dim": 64},  # shared experts
}


def folder(path: Path, family: str, bits: QuantConfig | None = None) -> LLM:
    model = Decoder(get_spec(family, **SIZES, **MODELS[family]))
    init_weights(model, 0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    llm = LLM((model if bits is None else quantize(model, bits)).eval())
    llm.save(path)
    return llm


def on_two(argv: list[str]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(2):
        env = {**os.environ, **shared, "RANK": str(rank)}
        command = [sys.executable, "-m", "oneblock", *argv]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return [(p.returncode, out, err) for p in started for out, err in [p.communicate(timeout=120)]]


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        *((family, None) for family in MODELS),
        *(("gpt_oss", bits) for bits in (QuantConfig(8), QuantConfig(4, 32), QuantConfig(fp8=True))),
        ("llama", QuantConfig(4, 32)),
    ],
)
def test_two_ranks_write_what_one_does(family: str, bits: QuantConfig | None, tmp_path: Path) -> None:
    llm = folder(tmp_path, family, bits)
    expected = llm.generate([1, 2, 3], max_tokens=24, temperature=0.7, seed=5, ignore_eos=True)
    argv = ["generate", str(tmp_path), "--ids", "1", "2", "3", "--max-tokens", "24", "--ignore-eos", "--json"]
    first, second = on_two([*argv, "--temperature", "0.7", "--seed", "5"])
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert second[1] == ""
    found = json.loads(first[1])
    assert found["ids"] == expected.ids
    assert found["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)


def test_a_rank_that_fails_ends_the_other_with_a_line(tmp_path: Path) -> None:
    folder(tmp_path, "llama")
    for status, _, err in on_two(["generate", str(tmp_path), "--ids", "1", "2", "--input", "x", "--output", "y"]):
        assert status == 1
        assert "several ranks go on with one prompt" in err


def test_a_prompt_cache_is_one_process_own(tmp_path: Path) -> None:
    folder(tmp_path, "llama")
    for status, _, err in on_two(["generate", str(tmp_path), "--ids", "1", "2", "--prompt-cache", str(tmp_path / "c")]):
        assert status == 1
        assert "--prompt-cache holds the keys of one process" in err


def test_what_does_not_divide_is_told() -> None:
    def made(family: str, **sizes: int) -> Spec:
        return get_spec(family, **{**SIZES, "n_layers": 1, **sizes})

    for built, said in (
        (made("llama", dim=96, n_heads=6, n_kv_heads=3), "3 KV heads do not divide by 2 ranks"),
        (made("llama", n_heads=1, n_kv_heads=1), "1 heads do not divide by 2 ranks"),
        (made("mixtral", hidden_dim=33), "33 hidden numbers do not divide by 2 ranks"),
        (made("olmo2"), "norms over all heads"),
    ):
        with pytest.raises(OneblockError, match=said):
            check(built, Ranks(0, 2))


def test_codes_are_cut_between_tiles_and_groups() -> None:
    layer = QuantizedLinear(48, 128, 64)
    for dim, here, said in ((0, slice(0, 24), "24 rows .* multiple of 16"), (1, slice(32, 96), "64 columns")):
        with pytest.raises(OneblockError, match=said):
            part(layer, dim, here)
    layer.fill(*quantize_int4(torch.randn(48, 128), 64))
    assert torch.equal(part(layer, 0, slice(16, 48)).rows(), layer.rows()[16:])
    assert torch.equal(part(layer, 1, slice(64, 128)).rows(), layer.rows()[:, 64:])


def test_a_rank_holds_its_part_alone(tmp_path: Path) -> None:
    """Of a file's pages that were mapped, what blocks hold is copied: the rest can go."""
    llm = folder(tmp_path, "llama")
    whole = llm.model.blocks[0]
    half = load(tmp_path, ranks=Ranks(1, 2)).model.blocks[0]
    assert sum(p.nbytes for p in half.parameters() if p.dim() > 1) * 2 == sum(
        p.nbytes for p in whole.parameters() if p.dim() > 1
    )
    for p in half.parameters():
        assert p.dim() == 1 or p.untyped_storage().nbytes() == p.nbytes
