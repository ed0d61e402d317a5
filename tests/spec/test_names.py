"""Names, families and their keywords."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, assert_type

import pytest

import oneblock
from oneblock.errors import OneblockError
from oneblock.plan import Plan
from oneblock.spec import FAMILIES, MODELS, LinearScaling, Rope, Spec, get_spec


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_and_is_hashable(name: str):
    spec = get_spec(name)
    assert spec == get_spec(name) and hash(spec) == hash(get_spec(name))
    assert len(spec.layers) == spec.n_layers
    assert spec.n_layers >= len(spec.pattern)
    for layer in spec.layers:
        assert layer.attn.n_heads % layer.attn.n_kv_heads == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_tiny_model_by_default(family: str):
    tiny = FAMILIES[family]()
    assert isinstance(tiny, Spec)
    assert tiny.dim <= 64 and tiny.n_layers <= 6 and tiny.vocab == 256


def changed(name: str, value: Any, n_layers: int) -> Any:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case None:
            return {"n_kv_heads": 2, "rope": Rope(7.0), "chunked": (False,)}.get(name, 48)
        case int():
            return 2 if name == "n_heads" else value * 2
        case float():
            return value / 2
        case str():
            return "relu2"
        case Rope():
            return replace(value, scaling=LinearScaling(3.0))
        case tuple() if all(isinstance(x, bool) for x in value):
            return tuple(not x for x in value) if len(set(value)) > 1 or n_layers == 1 else (value[0], not value[0])
        case tuple():
            return tuple(2 * x for x in value)
    raise AssertionError(f"{name}={value!r}")


# Keywords that say something only where another has been given too.
SOME = {"sparse": (False, True)}
NEEDS: dict[str, dict[str, Any]] = {"sliding": {"window": 16}, "hidden_dim": SOME, "dense_hidden_dim": SOME}


@pytest.mark.parametrize(("family", "keyword"), [(f, k) for f, build in FAMILIES.items() for k in build.keywords])
def test_every_keyword_changes_the_spec(family: str, keyword: str):
    build = FAMILIES[family]
    known = build.keywords
    first = {k: v for k, v in NEEDS.get(keyword, {}).items() if k in known}
    base = build(**first)
    value = changed(keyword, known[keyword], base.n_layers)
    assert build(**{**first, keyword: value}) != base


def test_changes_apply_to_a_model():
    assert get_spec("gpt2", n_layers=2) == replace(get_spec("gpt2"), n_layers=2)
    assert get_spec("Llama-3-8B") == get_spec("llama-3-8b")
    assert get_spec("gpt-oss").pattern == FAMILIES["gpt_oss"]().pattern


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3-8b", {}, "did you mean 'llama-3-8b'"),
        ("gema2", {}, "did you mean 'gemma2'"),
        ("llama-3-8b", {"n_layer": 2}, "unknown llama keyword 'n_layer': did you mean 'n_layers'"),
        ("zzzzzzzz", {}, "unknown model 'zzzzzzzz' "),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, changes: dict[str, Any], message: str):
    with pytest.raises(OneblockError, match=message):
        get_spec(name, **changes)


def test_public_functions_have_types_that_checkers_infer():
    """`assert_type` is checked by pyright in `make check`."""
    small = assert_type(oneblock.get_spec("llama", dim=32, n_heads=2), Spec)
    costs = assert_type(oneblock.plan_model(small, context=64), Plan)
    assert small == get_spec("llama", dim=32, n_heads=2)
    assert costs.params_total == 32 * 256 * 2 + 5 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 96)
    assert {"get_spec", "plan_model"} <= set(dir(oneblock))


def test_neither_spec_nor_plan_imports_torch():
    code = "import sys, oneblock.spec, oneblock.plan; sys.exit(bool({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layers_that_differ_are_where_they_should_be():
    gemma = get_spec("gemma-3-1b").layers
    assert [i for i, x in enumerate(gemma) if x.attn.window is None] == [5, 11, 17, 23]
    vision = get_spec("llama-3.2-11b-vision").layers
    assert [i for i, x in enumerate(vision) if x.attn.cross] == [3, 8, 13, 18, 23, 28, 33, 38]
    assert all(x.gated == x.attn.cross == (x.attn.rope is None) for x in vision)
    scout = get_spec("llama-4-scout").layers
    assert [i for i, x in enumerate(scout) if x.attn.rope is None] == list(range(3, 48, 4))
    assert all((x.attn.chunk is None) == (x.attn.rope is None) == (x.attn.qk_norm is None) for x in scout)
    smol = get_spec("smollm3-3b").layers
    assert [i for i, x in enumerate(smol) if x.attn.rope is None] == list(range(3, 36, 4))
    oss = get_spec("gpt-oss-20b").layers
    assert [x.attn.window for x in oss[:4]] == [128, None, 128, None]
    assert [x.attn.window for x in get_spec("gpt3-175b").layers[:4]] == [None, 256, None, 256]
    assert [x.attn.window for x in get_spec("gpt3-175b", window=64).layers[:4]] == [None, 64, None, 64]


def test_scores_shrink_with_depth_in_the_gpt2_that_asks_for_it():
    scales = [x.attn.scale for x in get_spec("gpt2", scale_by_depth=True, n_layers=3).layers]
    assert scales == pytest.approx([1 / 8, 1 / 16, 1 / 24])
    assert get_spec("gpt2", scaled=False).pattern[0].attn.scale == 1.0
    assert get_spec("gpt2").pattern[0].attn.scale is None
