"""Every size against the table of facts about the lineage, where that is at hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from oneblock.plan import params
from oneblock.spec import MODELS, Spec, get_spec
from oneblock.store.config import write_config

BESIDE = Path(__file__).parents[3] / "shared" / "lineage"
FACTS = Path(os.environ.get("ONEBLOCK_LINEAGE") or BESIDE) / "models.json"

# The paper's head counts of these two do not fit its widths.
ODD_HEADS = {"GPT-3 XL (1.3B)", "GPT-3 13B"}


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    if not FACTS.exists():
        pytest.skip(f"no table of facts at {FACTS}: ONEBLOCK_LINEAGE may name its folder")
    return {row["name"]: row for row in json.loads(FACTS.read_text(encoding="utf-8"))}


# Models that the table of facts does not have: the count of the class that transformers builds from their config.json.
# StableLM-2-1.6B's card prints 98,304 fewer, one of the two vectors of each layer's norms.
COUNTS = {
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "stablelm-3b": 2_795_443_200,
    "stablelm-2-1.6b": 1_644_515_328,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_models_beside_the_table(name: str):
    """Equal to the reference implementation's own number of parameters."""
    config = write_config(get_spec(name))
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert params.total(get_spec(name)) == COUNTS[name] == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in COUNTS])
def test_numbers(name: str, facts: dict[str, dict[str, Any]]):
    fact, spec = facts[MODELS[name].title], get_spec(name)
    assert fact["family"] == MODELS[name].family
    assert numbers(spec) == {
        "params_total": fact.get("params_text", fact["params_total"]),
        "params_active": fact.get("params_active_text", fact.get("params_text", fact["params_active"])),
        "dim": fact["hidden"],
        "layers": fact["layers"],
        "vocab": fact["vocab"],
        "max_ctx": fact["max_ctx"],
        "norm_eps": fact["norm_eps"],
        "tied": fact["tied"],
    }
    attn = spec.pattern[0].attn
    if fact["name"] not in ODD_HEADS:
        assert (attn.n_heads, attn.n_kv_heads, attn.head_dim) == (fact["q_heads"], fact["kv_heads"], fact["head_dim"])
    if MODELS[name].family != "gpt3":  # its window was never published
        windows = {x.attn.window for x in spec.layers} - {None}
        assert windows == ({fact["sliding_window"]} if fact["sliding_window"] else set())
    assert {x.attn.rope.theta for x in spec.layers if x.attn.rope} == thetas(fact["rope_parameters"])


def numbers(spec: Spec) -> dict[str, Any]:
    return {
        "params_total": params.total(spec),
        "params_active": params.total(spec, active=True),
        "dim": spec.dim,
        "layers": spec.n_layers,
        "vocab": spec.vocab,
        "max_ctx": spec.context,
        "norm_eps": spec.norm.eps,
        "tied": spec.tied,
    }


def thetas(rope: dict[str, Any] | None) -> set[float]:
    if rope is None:
        return set()
    return {rope["rope_theta"]} if "rope_theta" in rope else {each["rope_theta"] for each in rope.values()}


def test_only_what_cannot_be_built_is_missing(facts: dict[str, dict[str, Any]]):
    assert {m.title for m in MODELS.values()} - set(facts) == {MODELS[name].title for name in COUNTS}
    assert set(facts) - {m.title for m in MODELS.values()} == {
        "OPT-350M",  # projects its embeddings
        "DeepSeek-V3 (671B)",  # latent attention
        "Phi-3-small-8k (7B)",  # block-sparse attention
        "Llama-4-Behemoth (announced)",  # never released
        "GPT-3.5 / InstructGPT",  # a recipe
    }
