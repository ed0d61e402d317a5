"""Two ranks write what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.infer.parallel import Ranks, check
from oneblock.infer.quantize import Bits, quantize
from oneblock.model import Decoder, init_weights
from oneblock.spec import spec


def folder(path: Path, family: str) -> LLM:
    model = Decoder(spec(family, vocab=64, dim=64, n_layers=2, n_heads=4, context=64))
    init_weights(model, 0)
    llm = LLM(model.eval())
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_ranks_write_what_one_does(family: str, tmp_path: Path) -> None:
    llm = folder(tmp_path, family)
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


def test_what_does_not_divide_is_told() -> None:
    def made(family: str, **sizes: int) -> Decoder:
        return Decoder(spec(family, **{"vocab": 64, "dim": 64, "n_layers": 1, "n_heads": 4, "context": 64, **sizes}))

    for model, said in (
        (made("llama", n_kv_heads=1), "1 KV heads do not divide by 2 ranks"),
        (made("llama", n_heads=1, n_kv_heads=1), "1 heads do not divide by 2 ranks"),
        (made("mixtral"), "experts are not split"),
        (made("olmo2"), "norms over all heads"),
        (quantize(made("llama"), Bits(8)), "weights in few bits are not split"),
    ):
        with pytest.raises(OneblockError, match=said):
            check(model, Ranks(0, 2))
