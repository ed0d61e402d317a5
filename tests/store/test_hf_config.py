"""config.json to Spec and back: defaults, old and new forms, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import transformers

from oneblock.errors import OneblockError
from oneblock.spec import (
    FAMILIES,
    MODELS,
    DynamicNTK,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Rope,
    Spec,
    Yarn,
    get_spec,
)
from oneblock.store.config import family_of, read_config, write_config
from oneblock.store.families import FAMILIES as CLASSES

CONFIGS = {
    "llama": "Llama",
    "openai-gpt": "OpenAIGPT",
    "gpt2": "GPT2",
    "gpt_neo": "GPTNeo",
    "opt": "OPT",
    "gpt_neox": "GPTNeoX",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi": "Phi",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "stablelm": "StableLm",
    "cohere2": "Cohere2",
    "gpt_oss": "GptOss",
    "llama4_text": "Llama4Text",
    "mllama_text_model": "MllamaText",
}


def read(raw: dict[str, Any], folder: Path) -> Spec:
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)[0]


def normalised(raw: dict[str, Any]) -> dict[str, Any]:
    """The configuration as transformers understands it: its defaults filled in, its present form."""
    values = {key: value for key, value in deepcopy(raw).items() if key != "model_type"}
    config = getattr(transformers, CONFIGS[raw["model_type"]] + "Config")(**values)
    return {**json.loads(config.to_json_string(use_diff=False)), "model_type": raw["model_type"]}


def test_every_class_is_compared() -> None:
    assert {family.model_types[0] for family in CLASSES} == {*CONFIGS, "oneblock"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_absent_keys_have_the_class_defaults(kind: str, tmp_path: Path) -> None:
    bare = {"model_type": kind}
    assert read(bare, tmp_path) == read(normalised(bare), tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_default_stands_alone(kind: str, tmp_path: Path) -> None:
    """Leaving out any one key of a full configuration gives what transformers then gives."""
    full = normalised(
        {"model_type": kind, "num_hidden_layers": 12} if kind not in ("gpt_neo",) else {"model_type": kind}
    )
    for key in full.keys() - {"model_type", "transformers_version", "architectures", "dtype"}:
        raw = {name: value for name, value in full.items() if name != key}
        try:
            theirs = normalised(raw)
        except Exception:
            continue  # what is left contradicts itself
        assert read(raw, tmp_path) == read(theirs, tmp_path), key


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA |= {"num_key_value_heads": 2}
SIX = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
SU = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
PHI3 = {**LLAMA, "model_type": "phi3", "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
OLD_FORMS: list[dict[str, Any]] = [
    {**LLAMA, "rope_theta": 500000, "rope_scaling": None},
    {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
    {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 17}},
    {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {**LLAMA, "rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    {**LLAMA, "rope_scaling": {**YARN, "attention_factor": 1.3}},
    {**LLAMA, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    {**LLAMA, "rope_parameters": {**YARN, "factor": None, "rope_theta": 777.0}},
    {**LLAMA, "rope_scaling": {**YARN}, "original_max_position_embeddings": 48},
    {**LLAMA, "rope_parameters": {"rope_type": "default"}, "rope_theta": 123.0},
    {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rope_theta": 123.0},
    {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    {**LLAMA, "rope_scaling": {**SU, "rope_type": "longrope", "original_max_position_embeddings": 64}},
    {**LLAMA, "rope_scaling": {**SU, "rope_type": "longrope", "factor": 3.0}},
    {**LLAMA, "head_dim": None, "num_key_value_heads": None},
    {**LLAMA, "model_type": "mistral", "sliding_window": None},
    {**LLAMA, "model_type": "mixtral", "sliding_window": 12, "num_experts": 3},
    {**LLAMA, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 77},
    {**LLAMA, "model_type": "gpt_neox", "rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 1.0},
    {**LLAMA, "model_type": "phi", "partial_rotary_factor": 0.25, "rope_theta": 99.0},
    {**LLAMA, "model_type": "phi", "rope_parameters": {"partial_rotary_factor": 0.75, "rope_type": "default"}},
    {**PHI3, "rope_scaling": {**SU, "original_max_position_embeddings": 9}},
    {**PHI3, "rope_scaling": {**SU, "type": "yarn", "original_max_position_embeddings": 9}, "rope_theta": 5.0},
    {**PHI3, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **SIX}},
    {**GEMMA3, "rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {**GEMMA3, "sliding_window_pattern": 2, "sliding_window": 7},
    {**GEMMA3, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5}}},
    {**GEMMA3, "rope_parameters": {"sliding_attention": YARN | {"rope_theta": 50.0}, "full_attention": None}},
    {**LLAMA, "model_type": "gpt_oss", "rope_scaling": {**YARN, "truncate": False}, "rope_theta": 150000},
    {**LLAMA, "model_type": "gpt_oss", "num_hidden_layers": 3, "num_experts": 5},
    {**LLAMA, "model_type": "cohere2", "sliding_window_pattern": 3, "num_hidden_layers": 7},
    {**LLAMA, "model_type": "smollm3", "no_rope_layer_interval": 3, "num_hidden_layers": 7},
    {**LLAMA, "model_type": "smollm3", "use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 5},
    {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4},
    {**LLAMA, "model_type": "qwen2", "sliding_window": 9, "max_window_layers": 0},
    {**LLAMA, "model_type": "qwen3_moe", "num_local_experts": 6, "decoder_sparse_step": 2, "head_dim": 24},
    {**LLAMA, "model_type": "qwen2_moe", "mlp_only_layers": [0], "use_sliding_window": True, "max_window_layers": 3},
    {**LLAMA, "model_type": "llama4_text", "no_rope_layers": [], "moe_layers": [0, 2], "num_hidden_layers": 4},
    {**LLAMA, "model_type": "llama4_text", "attn_temperature_tuning": False, "interleave_moe_layer_step": 2},
    {**LLAMA, "model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 9},
    {**LLAMA, "model_type": "olmo3", "rope_theta": 3e5, "rope_scaling": YARN},
    {**LLAMA, "model_type": "olmo3", "rope_parameters": {"sliding_attention": {"rope_theta": 50.0}}},
    {**LLAMA, "model_type": "stablelm", "partial_rotary_factor": 0.5, "rope_theta": 99.0, "use_qkv_bias": True},
    {**LLAMA, "model_type": "stablelm", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"model_type": "gemma", "hidden_act": "gelu"},
    {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    {"model_type": "gpt_neo", "num_layers": 3, "attention_types": [[["global", "local", "local"], 1]]},
    {"model_type": "opt", "do_layer_norm_before": False, "word_embed_proj_dim": None},
]


@pytest.mark.parametrize("raw", OLD_FORMS, ids=lambda raw: raw["model_type"])
def test_old_forms_read_like_what_transformers_makes_of_them(raw: dict[str, Any], tmp_path: Path) -> None:
    assert read(raw, tmp_path) == read(normalised(raw), tmp_path)


def test_ropes_by_hand(tmp_path: Path) -> None:
    """The same as numbers, so that not both sides can be wrong alike."""

    def rope(**more: Any) -> Rope | None:
        return read({**LLAMA, **more}, tmp_path).pattern[0].attn.rope

    assert rope(rope_theta=5e5) == Rope(500000.0)
    assert rope(rope_scaling={"type": "linear", "factor": 2}) == Rope(scaling=LinearScaling(2.0))
    assert rope(rope_scaling={"type": "dynamic", "factor": 2}) == Rope(scaling=DynamicNTK(2.0, 256))
    assert rope(rope_scaling=YARN | {"attention_factor": 1.5}) == Rope(scaling=Yarn(8.0, 32, attention_factor=1.5))
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    llama3["original_max_position_embeddings"] = 64
    assert rope(rope_scaling=llama3) == Rope(scaling=Llama3Scaling(8.0, 1.0, 4.0, 64))
    longrope = {**SU, "rope_type": "longrope", "attention_factor": 1.0}
    assert rope(rope_scaling=longrope) == Rope(scaling=LongRope((1.0,) * 8, (2.0,) * 8, 256))


@pytest.mark.parametrize("name", MODELS)
def test_presets_read_back(name: str) -> None:
    spec = get_spec(name)
    config = write_config(spec)
    assert family_of(config).config.read(config) == spec
    assert json.loads(json.dumps(config)) == config
    ours = MODELS[name].family == "gpt3"  # no Hugging Face class has GPT-3's banded layers with its biases
    assert (config["model_type"] == "oneblock") == ours


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].family != "gpt3"])
def test_transformers_reads_the_same_from_what_is_written(name: str, tmp_path: Path) -> None:
    config = write_config(get_spec(name))
    if config["model_type"] == "mllama_text_model":
        config["bos_token_id"] = 0  # the class allows none
    assert read(normalised(config), tmp_path) == get_spec(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_small_families_read_back(name: str) -> None:
    config = write_config(get_spec(name))
    assert family_of(config).config.read(config) == get_spec(name)


def test_an_architecture_of_ones_own_reads_back() -> None:
    llama, gpt2 = get_spec("llama").pattern[0], get_spec("gpt2").pattern[0]
    layers = (llama, get_spec("gpt_oss").pattern[0], Layer(gpt2.attn, llama.mlp))
    mixed = Spec(50, 64, 3, layers, 99, logit_scale=0.3)
    config = write_config(mixed)
    assert config["model_type"] == "oneblock"
    assert family_of(config).config.read(json.loads(json.dumps(config))) == mixed


# ------------------------------------------------------------------ image-text models


@pytest.mark.parametrize(
    ("outer", "inner"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text"), ("mllama", "mllama_text_model")]
)
def test_the_text_side_of_image_text_models(outer: str, inner: str, tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": outer, "text_config": text, "dtype": "bfloat16"}))
    spec, config = read_config(tmp_path)
    assert config["model_type"] == inner
    assert config["dtype"] == "bfloat16"
    assert spec == read({"model_type": inner, **text}, tmp_path)


# ------------------------------------------------------------------ refusals

BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mamba"}, "model_type 'mamba' is not a known class; known are cohere2, gemma"),
    ({}, "model_type None is not a known class"),
    (
        {**LLAMA, "rope_scaling": {"rope_type": "mrope"}},
        "RoPE type 'mrope' is not supported; supported are default, li",
    ),
    ({**PHI3, "rope_scaling": {"type": "linear", "factor": 2}}, "supported are default, longrope"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}}, "factor of RoPE is None"),
    ({**LLAMA, "rope_scaling": {**SU, "rope_type": "longrope", "long_factor": [1.0]}}, "list of 8 numbers"),
    ({**LLAMA, "rope_scaling": "yarn"}, "rope_parameters is 'yarn'"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({**LLAMA, "model_type": "gpt_neox", "hidden_size": 48}, "RoPE over 3 of 12 dimensions"),
    ({**LLAMA, "hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported are gelu"),
    ({**LLAMA, "hidden_size": "64"}, "hidden_size is '64', not an integer above 0"),
    ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({**LLAMA, "rms_norm_eps": None}, "rms_norm_eps is None, not a finite number"),
    ({**LLAMA, "attention_bias": 1}, "attention_bias is 1, neither true nor false"),
    ({**LLAMA, "num_attention_heads": 5}, "dim 64 is not divisible by n_heads=5"),
    ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "weights quantized by 'fp8' are not supported"),
    ({**LLAMA, "per_layer_config": {"0": {}}}, "per_layer_config is not supported"),
    ({"model_type": "opt", "word_embed_proj_dim": 512}, "word_embed_proj_dim 512 is not supported, only 768"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention True is not supported"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types must hold 26 of full_attention"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear"}}, "must hold full_attention and sliding"),
    ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm True is not supported, only False"),
    ({"model_type": "gpt_oss", "swiglu_alpha": 1.0}, "swiglu_alpha 1.0 is not supported"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers has 2 numbers for 36 layers"),
    ({"model_type": "gpt_neo", "attention_types": 3}, "value of the wrong type"),
    ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**12]]}, "must give global or local to 24 layers"),
    ({"model_type": "oneblock", "spec": {"part": "Tree"}}, "unknown part 'Tree'"),
    ({"model_type": "oneblock"}, "spec is not that of a model"),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_is_not_implemented_is_refused_in_a_line(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OneblockError) as error:
        read(raw, tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(OneblockError, match="no such folder or file"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(OneblockError, match=r"has no config\.json; give a model's folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(OneblockError, match="is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(OneblockError, match="is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(OneblockError, match="is not a JSON object"):
        read_config(tmp_path)


# ------------------------------------------------------------------ limits

TOO_LARGE: list[tuple[dict[str, Any], str]] = [
    ({**LLAMA, "num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000, not an integer from 1 to 1,024"),
    ({**LLAMA, "num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000, not an integer from 1"),
    ({**LLAMA, "vocab_size": 10**12}, "vocab_size is 1,000,000,000,000"),
    ({**LLAMA, "hidden_size": 1 << 40}, "hidden_size is 1,099,511,627,776"),
    ({**LLAMA, "intermediate_size": 1 << 40}, "intermediate_size is 1,099,511,627,776"),
    ({**LLAMA, "num_attention_heads": 10**9}, "num_attention_heads is 1,000,000,000"),
    ({**LLAMA, "head_dim": 10**9}, "head_dim is 1,000,000,000"),
    ({**LLAMA, "max_position_embeddings": 10**80}, "max_position_embeddings is above 2^64"),
    ({**LLAMA, "model_type": "gemma2", "num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000"),
    ({**LLAMA, "model_type": "smollm3", "num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000"),
    ({"model_type": "gpt2", "n_layer": 10**12}, "n_layer is 1,000,000,000,000"),
    ({"model_type": "gpt_neo", "num_layers": 10**12}, "num_layers is 1,000,000,000,000"),
    ({**LLAMA, "model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts is 1,000,000,000"),
    ({**LLAMA, "model_type": "mixtral", "num_local_experts": 9000}, "experts is 288,000, above the limit of 65,536"),
    ({**LLAMA, "rope_scaling": {**YARN, "factor": 10**400}}, "factor of RoPE is"),
]


@pytest.mark.parametrize(("raw", "message"), TOO_LARGE, ids=[message[:30] for _, message in TOO_LARGE])
def test_sizes_above_the_limits_are_refused_before_anything_is_built(
    raw: dict[str, Any], message: str, tmp_path: Path
) -> None:
    start = time.perf_counter()
    with pytest.raises(OneblockError) as error:
        read(raw, tmp_path)
    assert time.perf_counter() - start < 2
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_of_our_own_form_have_limits(tmp_path: Path) -> None:
    config = write_config(get_spec("gpt3"))
    for change, message in (
        ({"n_layers": 10**12}, "n_layers is 1,000,000,000,000"),
        ({"vocab": "50257"}, "vocab is '50257', not an integer from 1 to 16,777,216"),
        ({"pattern": config["spec"]["pattern"] * 1500}, "pattern length is 3,000"),
    ):
        with pytest.raises(OneblockError, match=message):
            read({**config, "spec": config["spec"] | change}, tmp_path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "num_hidden_layers", "unknown_key"])
def test_nan_and_infinity_are_refused(key: str, value: str, tmp_path: Path) -> None:
    text = json.dumps({"model_type": "llama", key: 12345}).replace("12345", value)
    (tmp_path / "config.json").write_text(text)
    if (key, value) == ("unknown_key", "1e999"):  # valid JSON that nothing reads
        return
    with pytest.raises(OneblockError) as error:
        read_config(tmp_path)
    message = str(error.value)
    assert "not a JSON number" in message or "not a finite number" in message or "not an integer" in message


def test_deeply_nested_configurations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(OneblockError, match="is not valid JSON"):
        read_config(tmp_path)


def test_an_unknown_class_is_named_before_its_dtype_or_quantization(tmp_path: Path) -> None:
    """DeepSeek-V3 is stored in fp8: advice to get it in bf16 would be of no use."""
    raw = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float8_e4m3fn"}
    with pytest.raises(OneblockError, match="model_type 'deepseek_v3' is not a known class") as error:
        read(raw, tmp_path)
    assert "bf16" not in str(error.value)


def test_configurations_are_read_without_torch() -> None:
    code = "import sys, oneblock.store, oneblock.store.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
