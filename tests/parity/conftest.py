"""Tiny reference models of every class, with the features of each class on: what parity is tested against.

A test that takes `reference` runs once for every case.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LENGTH = 72  # past every window, chunk and LongRoPE limit below
SHORT = 24  # within the LongRoPE limits

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 96, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
BASE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-3}
WIDE = {"head_dim": 16}  # not hidden_size / heads
GPT = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "layer_norm_epsilon": 1e-3}
GPT |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
NEO = {"vocab_size": 101, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 96}
NEO |= {"window_size": 9, "attention_types": [[["global", "local"], 1], [["local"], 1]], "layer_norm_epsilon": 1e-3}
NEO |= {"bos_token_id": None, "eos_token_id": None, "intermediate_size": 40}
OPT = SIZES | {"ffn_dim": 40, "word_embed_proj_dim": 32}
NEOX = SIZES | {"intermediate_size": 48, "layer_norm_eps": 1e-3, "hidden_size": 64, "rotary_pct": 0.25}
MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "rope_theta": 100.0}
YARN |= {"original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 40}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 1.7, 1.9, 2.0]}
LONGROPE |= {"long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0]}
PARTIAL = {"short_factor": LONGROPE["short_factor"][:6], "long_factor": LONGROPE["long_factor"][:6]}
SHARP = {"rope_type": "default", "rope_theta": 100.0}


@dataclass(frozen=True)
class Case:
    name: str
    config: str  # transformers' class names, without Config and ForCausalLM
    values: dict[str, Any]
    model: str | None = None
    image: bool = False


def case(
    name: str, config: str, base: dict[str, Any], model: str | None = None, image: bool = False, **more: Any
) -> Case:
    return Case(name, config, base | more, model, image)


def llama(name: str, **more: Any) -> Case:
    return case(name, "Llama", BASE | WIDE, **more)


CASES = [
    case("gpt1", "OpenAIGPT", GPT, "OpenAIGPTLMHeadModel"),
    case("gpt2", "GPT2", GPT, "GPT2LMHeadModel", n_inner=40),
    case("gpt2-depth-scaled", "GPT2", GPT, "GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True),
    case("gpt2-unscaled-untied", "GPT2", GPT, "GPT2LMHeadModel", scale_attn_weights=False, tie_word_embeddings=False),
    case("gpt-neo", "GPTNeo", NEO),
    case("opt", "OPT", OPT),
    case("opt-post-norm", "OPT", OPT, do_layer_norm_before=False, activation_function="gelu"),
    case("opt-no-bias", "OPT", OPT, enable_bias=False, _remove_final_layer_norm=True),
    case("gpt-neox", "GPTNeoX", NEOX, rotary_emb_base=100),
    case(
        "gpt-neox-sequential", "GPTNeoX", NEOX, use_parallel_residual=False, attention_bias=False, rope_scaling=LINEAR
    ),
    llama("llama", num_hidden_layers=3),
    llama("llama-biased-tied", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_theta=500.0),
    llama("llama-multi-head", num_key_value_heads=4, hidden_act="gelu"),
    llama("llama-multi-query", num_key_value_heads=1, head_dim=None),
    llama("llama-linear", rope_parameters=LINEAR),
    llama("llama-dynamic", rope_parameters=DYNAMIC, max_position_embeddings=32),
    llama("llama-llama3", rope_parameters=LLAMA3),
    llama("llama-yarn", rope_parameters=YARN),
    llama("llama-yarn-mscale", rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}),
    llama("llama-longrope", rope_parameters=LONGROPE),
    case("mistral", "Mistral", BASE | WIDE, sliding_window=9, rope_parameters=SHARP),
    case(
        "mixtral", "Mixtral", BASE, sliding_window=9, num_local_experts=6, num_experts_per_tok=3, rope_parameters=SHARP
    ),
    case(
        "qwen2",
        "Qwen2",
        BASE | WIDE,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        rope_parameters=YARN,
    ),
    case(
        "qwen2-moe",
        "Qwen2Moe",
        BASE | MOE,
        shared_expert_intermediate_size=20,
        num_hidden_layers=4,
        max_window_layers=3,
        use_sliding_window=True,
        sliding_window=9,
        mlp_only_layers=[3],
        rope_parameters=SHARP,
    ),
    case(
        "qwen2-moe-normed",
        "Qwen2Moe",
        BASE | MOE,
        shared_expert_intermediate_size=20,
        norm_topk_prob=True,
        qkv_bias=False,
        decoder_sparse_step=2,
        rope_parameters=SHARP,
    ),
    case(
        "qwen3",
        "Qwen3",
        BASE | WIDE,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
    ),
    case("qwen3-moe", "Qwen3Moe", BASE | MOE | WIDE, decoder_sparse_step=2, norm_topk_prob=True, rope_parameters=SHARP),
    case(
        "qwen3-moe-window",
        "Qwen3Moe",
        BASE | MOE | WIDE,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        mlp_only_layers=[0],
        rope_parameters=SHARP,
    ),
    case("gemma", "Gemma", BASE | WIDE, attention_bias=True, num_key_value_heads=1, hidden_act="gelu"),
    case(
        "gemma2",
        "Gemma2",
        BASE | WIDE,
        num_hidden_layers=3,
        query_pre_attn_scalar=11,
        sliding_window=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        rope_parameters=SHARP,
    ),
    case(
        "gemma3",
        "Gemma3Text",
        BASE | WIDE,
        "Gemma3ForCausalLM",
        num_hidden_layers=4,
        sliding_window_pattern=3,
        sliding_window=9,
        query_pre_attn_scalar=11,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        rope_theta=1000.0,
        rope_local_base_freq=100.0,
    ),
    case("phi", "Phi", BASE, layer_norm_eps=1e-3, qk_layernorm=True, hidden_size=64, rope_theta=100.0),
    case("phi-part", "Phi", BASE, layer_norm_eps=1e-3, hidden_size=80, partial_rotary_factor=0.4, rope_theta=100.0),
    case("phi3", "Phi3", BASE | WIDE, sliding_window=9, rope_parameters=SHARP),
    case(
        "phi3-longrope",
        "Phi3",
        BASE | WIDE,
        hidden_size=64,
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=40,
        rope_scaling=LONGROPE | PARTIAL | {"type": "su"},
    ),
    case(
        "smollm3",
        "SmolLM3",
        BASE,
        num_hidden_layers=4,
        no_rope_layer_interval=3,
        use_sliding_window=True,
        sliding_window=9,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=SHARP,
    ),
    case("olmo2", "Olmo2", BASE, attention_bias=True, rope_parameters=SHARP),
    case(
        "olmo3",
        "Olmo3",
        BASE | WIDE,
        num_hidden_layers=5,
        attention_bias=True,
        sliding_window=9,
        rope_parameters={"full_attention": YARN, "sliding_attention": SHARP},
    ),
    case("stablelm", "StableLm", BASE, layer_norm_eps=1e-3, hidden_size=64, use_qkv_bias=True, rope_theta=100.0),
    case(
        "stablelm-parallel",
        "StableLm",
        BASE,
        layer_norm_eps=1e-3,
        use_parallel_residual=True,
        rope_parameters=SHARP | {"partial_rotary_factor": 0.5},
    ),
    case(
        "cohere2",
        "Cohere2",
        BASE,
        num_hidden_layers=3,
        layer_norm_eps=1e-3,
        sliding_window=9,
        sliding_window_pattern=2,
        attention_bias=True,
        logit_scale=0.3,
        rope_parameters=SHARP,
    ),
    case(
        "gpt-oss",
        "GptOss",
        BASE | WIDE,
        num_hidden_layers=3,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=9,
        swiglu_limit=0.5,
        rope_parameters=YARN | {"truncate": False},
    ),
    case(
        "llama4",
        "Llama4Text",
        BASE | WIDE,
        "Llama4ForCausalLM",
        num_hidden_layers=4,
        no_rope_layer_interval=3,
        attention_chunk_size=16,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=40,
        num_local_experts=6,
        num_experts_per_tok=2,
        floor_scale=8,
        attn_scale=0.7,
        rope_parameters=LLAMA3,
    ),
    case(
        "llama4-plain",
        "Llama4Text",
        BASE | WIDE,
        "Llama4ForCausalLM",
        num_hidden_layers=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=16,
        intermediate_size_mlp=40,
        num_local_experts=4,
        use_qk_norm=False,
        attention_bias=True,
        attn_temperature_tuning=False,
        rope_parameters=LLAMA3 | {"high_freq_factor": 1.0},
    ),
    case(
        "mllama",
        "MllamaText",
        BASE,
        "MllamaForCausalLM",
        image=True,
        num_hidden_layers=4,
        cross_attention_layers=[1, 3],
        rope_parameters=LLAMA3 | {"original_max_position_embeddings": 48},
        bos_token_id=1,
    ),
]


@dataclass(frozen=True)
class Run:
    """One input. `image` is (1, S, dim), for layers that read it."""

    ids: Tensor
    image: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    case: Case
    folder: Path
    model: nn.Module
    runs: list[Run]
    logits: list[Tensor]  # of each run


def reference_logits(model: nn.Module, run: Run) -> Tensor:
    more = {}
    if run.image is not None:  # without a mask the kernel takes the text before the image to be causal over it
        mask = torch.zeros(1, 1, run.ids.shape[1], run.image.shape[1])
        more = {"cross_attention_states": run.image, "cross_attention_mask": mask}
    with torch.no_grad():
        return model(input_ids=run.ids, use_cache=False, **more).logits


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """No parameter at the value it starts with: a norm weight of one or a gate of zero would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.empty(p.shape).normal_(generator=generator)
        if p.dim() == 1:
            p.copy_(noise * 0.5 + (name.endswith("weight") and "gemma" not in type(model).__name__.lower()))
        else:
            p.copy_(noise * (1.0 if "embed" in name or "wte" in name or "wpe" in name else 1.2 * p.shape[-1] ** -0.5))


def build(case: Case, folder: Path) -> Reference:
    config = getattr(transformers, f"{case.config}Config")(
        **deepcopy(case.values)
    )  # it writes into the dicts it is given
    model = getattr(transformers, case.model or f"{case.config}ForCausalLM")(config).eval()
    randomise(model, seed=len(case.name))
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 101, (1, LENGTH), generator=generator)
    runs = [Run(ids), Run(ids[:, :SHORT])]
    if case.image:
        runs.append(Run(ids, torch.empty(1, 13, case.values["hidden_size"]).normal_(generator=generator)))
    return Reference(case, folder, model, runs, [reference_logits(model, run) for run in runs])


@pytest.fixture(scope="session", params=CASES, ids=[case.name for case in CASES])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return build(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(scope="session")
def build_reference() -> Callable[[Path, str, dict[str, Any], str | None], Reference]:
    """Build the reference of any configuration: of a folder, transformers' class name, values and model class."""

    def build_one(folder: Path, config: str, values: dict[str, Any], model: str | None) -> Reference:
        image = bool(values.get("cross_attention_layers"))
        return build(Case(folder.name, config, values, model, image), folder)

    return build_one
