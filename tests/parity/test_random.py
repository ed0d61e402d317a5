"""Random configurations of every class give the reference's logits, and their configurations read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from oneblock.store import load_model
from oneblock.store.config import family_of
from oneblock.store.families import FAMILIES

Values = dict[str, Any]
TOLERANCE = 1e-4  # of the logits' standard deviation where that is above 1, as it is with tied embeddings
FEW, MANY = 3, 60  # configurations of each class: in every run, and with -m slow
ACTS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def flags(r: Random, *names: str) -> Values:
    return {name: r.random() < 0.5 for name in names}


def rope(r: Random, dim: int, types: tuple[str, ...], part: float | None = None) -> Values:
    """RoPE settings over `dim` dimensions, of one of these types."""
    kind = r.choice(types)
    values: Values = {"rope_type": kind, "rope_theta": r.choice([50.0, 1000.0, 10_000.0])}
    if part is not None:
        values["partial_rotary_factor"] = part
    if kind in ("linear", "dynamic", "llama3", "yarn", "longrope"):
        values["factor"] = r.choice([1.5, 4.0])
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = r.choice([32, 40])
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": r.choice([2.0, 4.0])}
    if kind == "yarn":
        values |= {"beta_fast": r.choice([4.0, 32.0]), "beta_slow": 1.0, **flags(r, "truncate")}
    if kind == "longrope":
        for name, most in (("short_factor", 2.0), ("long_factor", 8.0)):
            values[name] = [round(r.uniform(1.0, most), 2) for _ in range(dim // 2)]
    return values


ANY_ROPE = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def layer_types(r: Random, n_layers: int, kind: str = "sliding_attention") -> list[str]:
    return [r.choice([kind, "full_attention"]) for _ in range(n_layers)]


def sizes(r: Random, free_head_dim: bool = True) -> Values:
    """Sizes with Llama's keys. `free_head_dim`: the class lets head_dim differ from hidden_size / heads."""
    heads, head_dim = r.choice([2, 4, 6]), r.choice([8, 16, 24])
    values: Values = {"vocab_size": 101, "num_attention_heads": heads, "head_dim": head_dim}
    values |= {"num_key_value_heads": r.choice([n for n in (1, 2, heads) if heads % n == 0])}
    values |= {"hidden_size": heads * (r.choice([6, 10]) if free_head_dim else head_dim)}
    values |= {"num_hidden_layers": r.choice([1, 2, 3, 5]), "intermediate_size": r.choice([20, 48])}
    values |= {"max_position_embeddings": 96, "hidden_act": r.choice(ACTS), "rms_norm_eps": r.choice([1e-5, 1e-3])}
    values |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **flags(r, "tie_word_embeddings")}
    return values if free_head_dim else {key: value for key, value in values.items() if key != "head_dim"}


def head_dim(values: Values) -> int:
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def llama(r: Random, *own_flags: str, types: tuple[str, ...] = ANY_ROPE, free_head_dim: bool = True) -> Values:
    values = sizes(r, free_head_dim)
    return values | flags(r, *own_flags) | {"rope_parameters": rope(r, head_dim(values), types)}


def layer_norm(values: Values) -> Values:
    return {("layer_norm_eps" if key == "rms_norm_eps" else key): value for key, value in values.items()}


def partial(r: Random, *own_flags: str) -> Values:
    """Phi and StableLM: LayerNorm, and RoPE on a part of each head."""
    values, part = layer_norm(sizes(r, free_head_dim=False)), r.choice([0.25, 0.5, 1.0])
    return values | flags(r, *own_flags) | {"rope_parameters": rope(r, 0, ("default", "linear"), part)}


def windowed(r: Random, *own_flags: str, **more: Any) -> Values:
    values = llama(r, *own_flags, **more)
    return values | {"sliding_window": r.choice([5, 17]), "layer_types": layer_types(r, values["num_hidden_layers"])}


def switched(r: Random, *own_flags: str, **more: Any) -> Values:
    """Without use_sliding_window, layer types with a window would contradict it."""
    values = windowed(r, "use_sliding_window", *own_flags, **more)
    return values if values["use_sliding_window"] else {key: v for key, v in values.items() if key != "layer_types"}


def experts(r: Random, key: str = "num_experts") -> Values:
    n = r.choice([3, 6])
    return {key: n, "num_experts_per_tok": r.randint(1, n)}


def sparse(r: Random) -> Values:
    return experts(r) | {"moe_intermediate_size": 24, "decoder_sparse_step": r.choice([1, 2]), "mlp_only_layers": [0]}


def gpt(r: Random) -> Values:
    heads = r.choice([2, 4])
    values: Values = {
        "vocab_size": 101,
        "n_head": heads,
        "n_embd": heads * r.choice([8, 12]),
        "n_layer": r.choice([1, 3]),
    }
    values |= {"n_layer": r.choice([1, 3]), "n_positions": 96}
    values |= {"layer_norm_epsilon": r.choice([1e-5, 1e-3]), **flags(r, "tie_word_embeddings")}
    return values | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def gpt2(r: Random) -> Values:
    own = {"n_inner": r.choice([None, 40]), "activation_function": r.choice(ACTS)}
    return gpt(r) | own | flags(r, "scale_attn_weights", "scale_attn_by_inverse_layer_idx")


def gpt_neo(r: Random) -> Values:
    kinds, times = [r.choice(["global", "local"]) for _ in range(r.choice([1, 2, 3]))], r.choice([1, 2])
    values: Values = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_heads": r.choice([2, 4]),
        "window_size": r.choice([5, 17]),
    }
    values |= {"num_layers": len(kinds) * times, "attention_types": [[kinds, times]]}
    values |= {"intermediate_size": r.choice([None, 40]), "activation_function": r.choice(ACTS)}
    return values | {
        "max_position_embeddings": 96,
        "bos_token_id": None,
        "eos_token_id": None,
        **flags(r, "tie_word_embeddings"),
    }


def opt(r: Random) -> Values:
    values = sizes(r, free_head_dim=False)
    own = {"ffn_dim": r.choice([20, 40]), "word_embed_proj_dim": values["hidden_size"]}
    unused = ("intermediate_size", "rms_norm_eps", "num_key_value_heads", "hidden_act")
    own |= {"activation_function": r.choice(ACTS), **flags(r, "enable_bias", "do_layer_norm_before")}
    if own["do_layer_norm_before"]:
        own |= flags(r, "_remove_final_layer_norm")
    return {key: value for key, value in values.items() if key not in unused} | own


def gpt_neox(r: Random) -> Values:
    values = partial(r, "use_parallel_residual", "attention_bias")
    return {key: value for key, value in values.items() if key != "num_key_value_heads"}


def gemma(r: Random) -> Values:
    return llama(r, "attention_bias")


def gemma2(r: Random) -> Values:
    values = windowed(r, "attention_bias") | {"query_pre_attn_scalar": r.choice([7, 16])}
    values |= {"attn_logit_softcapping": r.choice([None, 2.0]), "final_logit_softcapping": r.choice([None, 3.0])}
    return values | {"hidden_activation": values.pop("hidden_act")}


def two_ropes(r: Random, values: Values) -> Values:
    """RoPE of the full and of the sliding-window layers."""
    types = ("default", "linear", "yarn")
    ropes = {kind: rope(r, head_dim(values), types) for kind in ("full_attention", "sliding_attention")}
    for one in ropes.values():
        one.pop("truncate", None)  # transformers does not find it there
    return {"rope_parameters": ropes}


def gemma3(r: Random) -> Values:
    values = gemma2(r)
    del values["attn_logit_softcapping"]
    return values | two_ropes(r, values)


def olmo3(r: Random) -> Values:
    values = windowed(r, "attention_bias")
    return values | two_ropes(r, values)


def phi3(r: Random) -> Values:
    values, part = sizes(r, free_head_dim=False), r.choice([0.5, 1.0])  # its check of LongRoPE takes no other head_dim
    return values | {
        "sliding_window": r.choice([None, 5, 17]),
        "original_max_position_embeddings": r.choice([32, 40]),
        "rope_parameters": rope(r, int(head_dim(values) * part), ("default", "longrope"), part),
    }


def smollm3(r: Random) -> Values:
    values = switched(r, "attention_bias", "mlp_bias", free_head_dim=False)
    return values | {"no_rope_layers": [r.randint(0, 1) for _ in range(values["num_hidden_layers"])]}


def cohere2(r: Random) -> Values:
    values = layer_norm(windowed(r, "attention_bias", types=("default", "linear")))
    return values | {"logit_scale": r.choice([0.3, 1.0])}


def gpt_oss(r: Random) -> Values:
    values = windowed(r, "attention_bias", types=("default", "linear", "yarn"))
    return values | experts(r, "num_local_experts") | {"swiglu_limit": r.choice([0.5, 7.0]), "hidden_act": "silu"}


def llama4(r: Random) -> Values:
    values = llama(r, "attention_bias", "use_qk_norm", "attn_temperature_tuning", types=("default", "llama3"))
    n = values["num_hidden_layers"]
    values |= experts(r, "num_local_experts") | {"intermediate_size_mlp": 40, "attention_chunk_size": r.choice([9, 16])}
    values |= {"moe_layers": [i for i in range(n) if r.random() < 0.6], "floor_scale": 8, "attn_scale": 0.7}
    return values | {
        "no_rope_layers": [r.randint(0, 1) for _ in range(n)],
        "layer_types": layer_types(r, n, "chunked_attention"),
    }


def mllama(r: Random) -> Values:
    values = llama(r, free_head_dim=False) | {"num_hidden_layers": 3, "bos_token_id": 1, "tie_word_embeddings": False}
    return values | {"cross_attention_layers": r.choice([[1], [0, 2], []])}


CLASSES: dict[str, Callable[[Random], Values]] = {
    "OpenAIGPT": gpt,
    "GPT2": gpt2,
    "GPTNeo": gpt_neo,
    "OPT": opt,
    "GPTNeoX": gpt_neox,
    "Llama": lambda r: llama(r, "attention_bias", "mlp_bias"),
    "Mistral": lambda r: llama(r) | {"sliding_window": r.choice([None, 5, 17])},
    "Mixtral": lambda r: llama(r) | {"sliding_window": r.choice([None, 9]), **experts(r, "num_local_experts")},
    "Qwen2": switched,
    "Qwen2Moe": lambda r: (
        switched(r, "norm_topk_prob", "qkv_bias") | sparse(r) | {"shared_expert_intermediate_size": 20}
    ),
    "Qwen3": lambda r: switched(r, "attention_bias"),
    "Qwen3Moe": lambda r: llama(r, "norm_topk_prob", "attention_bias") | sparse(r),
    "Gemma": gemma,
    "Gemma2": gemma2,
    "Gemma3Text": gemma3,
    "Phi": lambda r: partial(r, "qk_layernorm"),
    "Phi3": phi3,
    "SmolLM3": smollm3,
    "Olmo2": lambda r: llama(r, "attention_bias"),
    "Olmo3": olmo3,
    "Cohere2": cohere2,
    "GptOss": gpt_oss,
    "StableLm": lambda r: partial(r, "use_qkv_bias", "use_parallel_residual"),
    "Llama4Text": llama4,
    "MllamaText": mllama,
}
MODELS = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
MODELS |= {"Llama4Text": "Llama4ForCausalLM", "MllamaText": "MllamaForCausalLM"}


@torch.no_grad()
def check(build_reference: Any, name: str, seed: int, folder: Path) -> None:
    values = CLASSES[name](Random(f"{name} {seed}"))
    reference = build_reference(folder, name, values, MODELS.get(name))
    checkpoint = load_model(folder)
    for run, logits in zip(reference.runs, reference.logits, strict=True):
        ours = checkpoint.model(run.ids, image=run.image)
        difference = (ours - logits).abs().max() / logits.std().clamp(min=1)
        assert difference < TOLERANCE, f"{difference:.2g} with {run.ids.shape[1]} tokens: {json.dumps(values)}"
    config = family_of(checkpoint.config).config
    assert config.read(config.write(checkpoint.spec)) == checkpoint.spec, json.dumps(values)


def test_every_class_is_drawn() -> None:
    assert len(CLASSES) == len(FAMILIES) - 1  # all but our own form


@pytest.mark.parametrize("seed", range(FEW))
@pytest.mark.parametrize("name", CLASSES)
def test_random_configurations_give_the_reference_logits(
    name: str, seed: int, tmp_path: Path, build_reference: Any
) -> None:
    check(build_reference, name, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_many_random_configurations_give_the_reference_logits(name: str, tmp_path: Path, build_reference: Any) -> None:
    for seed in range(FEW, MANY):
        check(build_reference, name, seed, tmp_path / str(seed))
