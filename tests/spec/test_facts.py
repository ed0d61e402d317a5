"""Every size against the table of facts about the lineage, where that is at hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from oneblock.plan import params
from oneblock.spec import MODELS, Spec, get_spec

BESIDE = Path(__file__).parents[3] / "shared" / "lineage"
FACTS = Path(os.environ.get("ONEBLOCK_LINEAGE") or BESIDE) / "models.json"

# The paper's head counts of these two do not fit its widths.
ODD_HEADS = {"GPT-3 XL (1.3B)", "GPT-3 13B"}


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    if not FACTS.exists():
        pytest.skip(f"no table of facts at {FACTS}: ONEBLOCK_LINEAGE may name its folder")
    return {row["name"]: row for row in json.loads(FACTS.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", MODELS)
def test_numbers(name: str, facts: dict[str, dict[str, Any]]):
    fact, built = facts[MODELS[name].title], get_spec(name)
    assert fact["family"] == MODELS[name].family
    assert numbers(built) == {
        "params_total": fact.get("params_text", fact["params_total"]),
        "params_active": fact.get("params_active_text", fact.get("params_text", fact["params_active"])),
        "dim": fact["hidden"],
        "layers": fact["layers"],
        "vocab": fact["vocab"],
        "max_ctx": fact["max_ctx"],
        "norm_eps": fact["norm_eps"],
        "tied": fact["tied"],
    }
    attn = built.pattern[0].attn
    if fact["name"] not in ODD_HEADS:
        assert (attn.n_heads, attn.n_kv_heads, attn.head_dim) == (fact["q_heads"], fact["kv_heads"], fact["head_dim"])
    if MODELS[name].family != "gpt3":  # its window was never published
        windows = {x.attn.window for x in built.layers} - {None}
        assert windows == ({fact["sliding_window"]} if fact["sliding_window"] else set())
    assert {x.attn.rope.theta for x in built.layers if x.attn.rope} == thetas(fact["rope_parameters"])


def numbers(built: Spec) -> dict[str, Any]:
    return {
        "params_total": params.total(built),
        "params_active": params.total(built, active=True),
        "dim": built.dim,
        "layers": built.n_layers,
        "vocab": built.vocab,
        "max_ctx": built.context,
        "norm_eps": built.norm.eps,
        "tied": built.tied,
    }


def thetas(rope: dict[str, Any] | None) -> set[float]:
    if rope is None:
        return set()
    return {rope["rope_theta"]} if "rope_theta" in rope else {each["rope_theta"] for each in rope.values()}


def test_only_what_cannot_be_built_is_missing(facts: dict[str, dict[str, Any]]):
    assert set(facts) - {m.title for m in MODELS.values()} == {
        "OPT-350M",  # projects its embeddings
        "DeepSeek-V3 (671B)",  # latent attention
        "Phi-3-small-8k (7B)",  # block-sparse attention
        "Llama-4-Behemoth (announced)",  # never released
        "GPT-3.5 / InstructGPT",  # a recipe
    }
