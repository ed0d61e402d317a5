"""The prompt cache on disk: the same reply without prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.model import Decoder, init_weights
from oneblock.spec import get_spec


def random_llm(family: str, seed: int = 0) -> LLM:
    model = Decoder(get_spec(family, vocab=32, dim=32, n_layers=6, n_heads=2, context=128, **window_sizes(family)))
    init_weights(model, seed)
    return LLM(model.eval())


def window_sizes(family: str) -> dict[str, int]:
    return {"window": 16} if family == "gemma3" else {}


def count_fed_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that records the number of tokens of each forward pass."""
    passes: list[int] = []
    inner = llm.model.hidden_states

    def hidden_states(ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        passes.append(ids.shape[1])
        return inner(ids, **rest)

    monkeypatch.setattr(llm.model, "hidden_states", hidden_states)
    return passes


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cached_prefix_is_not_prefilled(
    family: str, kv_cache_dtype: Literal["auto", "int8"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, prompt, how = random_llm(family), list(range(1, 25)), {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    llm.kv_cache_dtype = kv_cache_dtype
    plain = [llm.generate(p, **how).ids for p in (prompt, [*prompt, 3, 4], [*prompt[:12], 30, 31])]
    llm.prompt_cache = tmp_path / "kept"
    assert llm.generate(prompt, **how).ids == plain[0]
    again = random_llm(family)  # as in another process
    again.prompt_cache, again.kv_cache_dtype = llm.prompt_cache, kv_cache_dtype
    passes = count_fed_tokens(again, monkeypatch)
    assert again.generate([*prompt, *plain[0][:5]], **how).ids[:7] == plain[0][5:]
    ring = family == "gemma3"  # keys before the window are gone
    assert passes[0] == (29 if ring else 1)
    assert again.generate([*prompt, 3, 4], **how).ids == plain[1]
    assert again.generate([*prompt[:12], 30, 31], **how).ids == plain[2]


def test_caches_of_another_model_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    llm, other = random_llm("llama"), random_llm("llama", seed=1)
    llm.prompt_cache = other.prompt_cache = tmp_path / "kept"
    llm.generate([1, 2, 3], max_tokens=3)
    with pytest.raises(OneblockError, match="is the prompt cache of another model or KV cache dtype"):
        other.generate([1, 2, 3], max_tokens=3)
    llm.kv_cache_dtype = "int8"
    with pytest.raises(OneblockError, match="is the prompt cache of another model or KV cache dtype"):
        llm.generate([1, 2, 3], max_tokens=3)
    llm.kv_cache_dtype = "auto"
    data = llm.prompt_cache.read_bytes()
    llm.prompt_cache.write_bytes(data[: len(data) // 2])
    with pytest.raises(OneblockError, match="delete it, and it is written again"):
        llm.generate([1, 2, 3], max_tokens=3)
    llm.prompt_cache = tmp_path / "text" / "kept"
    llm.prompt_cache.parent.write_text("")
    with pytest.raises(OneblockError, match="could not be written"):
        llm.generate([1, 2, 3], max_tokens=3)


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(data / "weights" / "stories260k"), "--prompt", "Once upon a time", "--temperature", "0"]
    argv += ["--max-tokens", "20", "--prompt-cache", str(tmp_path / "kept")]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert main(argv) == 0
    assert capsys.readouterr().out == first


def test_a_folder_is_refused_and_a_string_is_a_path(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = random_llm("llama")
    llm.prompt_cache = str(tmp_path / "kept")
    llm.generate([1, 2, 3], max_tokens=3)
    assert (tmp_path / "kept").is_file()
    with pytest.raises(OneblockError, match="is a folder; name a file in it"):
        llm.prompt_cache = tmp_path
    argv = ["generate", str(data / "weights" / "stories260k"), "--prompt", "Once", "--prompt-cache", str(tmp_path)]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert "is a folder; name a file in it" in err
    assert "delete" not in err
