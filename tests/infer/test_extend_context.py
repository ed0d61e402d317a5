"""RoPE scaling of a loaded model against transformers with the same setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import oneblock
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.model import Decoder, init_weights
from oneblock.spec import get_spec

METHODS = ["yarn", "linear", "dynamic"]


def save_llama(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("method", METHODS)
def test_scaled_rope_equals_transformers(method: str, tmp_path: Path) -> None:
    save_llama(tmp_path)
    llm = oneblock.load(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.max_position_embeddings = 128 if method == "yarn" else 32
    config.rope_parameters = {"rope_type": method, "factor": 4.0, "rope_theta": 10_000.0}
    config.rope_parameters |= {"original_max_position_embeddings": 32} if method == "yarn" else {}
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config).eval()
    llm.extend_context(128, method)  # type: ignore[arg-type]
    ids = torch.randint(64, (1, 100))
    with torch.no_grad():
        torch.testing.assert_close(llm.model(ids), peer(ids).logits, atol=1e-4, rtol=1e-4)
    assert len(llm.generate(ids[0].tolist(), max_tokens=20, ignore_eos=True).ids) == 20
    llm.save(tmp_path / "longer")
    with torch.no_grad():
        assert torch.equal(oneblock.load(tmp_path / "longer").model(ids), llm.model(ids))


def test_sliding_window_layers_stay_unscaled() -> None:
    model = Decoder(get_spec("gemma3", vocab=64, dim=32, n_layers=6, n_heads=2, context=64, window=16))
    init_weights(model, 0)
    before = [layer.attn.rope for layer in model.spec.layers]
    LLM(model).extend_context(256)
    after = [block.attn.spec.rope for block in model.blocks]
    assert after[:5] == before[:5]
    assert after[5].scaling.factor == 4


@pytest.mark.parametrize(
    ("family", "context", "message"),
    [
        ("gpt2", 256, "the model has 64 learned positions"),
        ("llama", 64, "context 64 is not longer than the model's own 64"),
        ("llama3.1", 256, "the model's RoPE already has Llama3Scaling scaling"),
    ],
)
def test_models_that_cannot_be_extended_are_refused(family: str, context: int, message: str) -> None:
    model = get_spec("llama-3.1-8b") if family == "llama3.1" else None
    if model is not None:
        from oneblock.infer.extend_context import scale_layer

        with pytest.raises(OneblockError, match=message):
            scale_layer(model.pattern[0], 64, context, "yarn")
        return
    llm = LLM(Decoder(get_spec(family, vocab=64, dim=32, n_layers=1, n_heads=2, context=64)))
    with pytest.raises(OneblockError, match=message):
        llm.extend_context(context)


def test_prompts_beyond_the_context_name_the_fix() -> None:
    llm = LLM(Decoder(get_spec("llama", vocab=64, dim=32, n_layers=1, n_heads=2, context=16)))
    with pytest.raises(OneblockError, match="17 tokens and the model's context 16: shorten the prompt, or extend"):
        llm.generate([1] * 17)
    llm.extend_context(32)
    assert llm.generate([1] * 17, max_tokens=2, ignore_eos=True).ids
    with pytest.raises(OneblockError, match="33 tokens and the model's context 32"):
        llm.generate([1] * 33)


@pytest.mark.parametrize(
    ("context", "method", "name"), [(1.5, "yarn", "context"), (2**40, "yarn", "context"), (64, "ntk", "rope_scaling")]
)
def test_context_and_method_are_checked(context: Any, method: Any, name: str) -> None:
    llm = LLM(Decoder(get_spec("llama", vocab=64, dim=32, n_layers=1, n_heads=2, context=16)))
    with pytest.raises(OneblockError, match=f"^{name} is .*, but it must be"):
        llm.extend_context(context, method)
