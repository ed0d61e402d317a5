"""Descriptions of architectures: every difference shows."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from oneblock.plan.describe import Change, by_layer, describe, diff
from oneblock.spec import (
    FAMILIES,
    MODELS,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Rope,
    Spec,
    Yarn,
    get_spec,
)

CHOICES = {
    "kind": {"rms": "layer", "layer": "rms", "learned": "sinusoidal"},
    "gain": {"after": "before", "before": "after"},
    "score_func": {"softmax": "sigmoid", "sigmoid": "softmax"},
    "act": {},
    "residual": {},
    "qk_norm": {"head": "full", "full": "l2", "l2": "head"},
}


def mutations(tree: Any) -> Iterator[tuple[str, Any]]:
    """The tree with one value changed, for every value in it."""
    if is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            for path, value in mutations_of(field.name, getattr(tree, field.name)):
                yield f"{field.name}{path}", replace(tree, **{field.name: value})


def mutations_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case bool():
            yield "", not value
        case int() | float():
            yield "", value * 2 + 1
        case str():
            yield "", CHOICES[name].get(value, "relu2" if name == "act" else "output" if value != "output" else "pre")
        case tuple():
            for i, each in enumerate(value):
                for path, other in mutations_of(name, each):
                    yield f"[{i}]{path}", (*value[:i], other, *value[i + 1 :])
        case None:
            yield from absent(name)
        case _:
            yield from ((f".{path}", other) for path, other in mutations(value))


def absent(name: str) -> Iterator[tuple[str, Any]]:
    """A value for an absent part."""
    values: dict[str, Any] = {
        "rope": Rope(),
        "qk_norm": "head",
        "temperature_tuning": (8.0, 0.1),
        "scaling": LinearScaling(2.0),
    }
    if name not in ("positions", "shared"):
        yield "", values.get(name, 3)


LONG = LongRope((1.0,) * 8, (2.0,) * 8, 64)
SCALINGS = [LinearScaling(2.0), DynamicNTK(2.0, 64), Llama3Scaling(8.0, 1.0, 4.0, 64), Yarn(4.0, 64), LONG]
SPECS = [(name, build()) for name, build in FAMILIES.items()]
SPECS += [(type(s).__name__, FAMILIES["llama"](rope=Rope(scaling=s))) for s in SCALINGS]


@pytest.mark.parametrize(("name", "built"), SPECS, ids=[name for name, _ in SPECS])
def test_every_changed_value_shows(name: str, built: Spec):
    changed = list(mutations(built))
    assert len(changed) > 25
    for path, other in changed:
        if other != built:
            assert diff(built, other), f"{name}: no change shown for {path}"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_does_not_differ_from_itself(name: str):
    assert diff(get_spec(name), get_spec(name)) == []


def changes(before: str, after: str) -> list[str]:
    return [str(change) for change in diff(get_spec(before), get_spec(after))]


def test_from_gpt_1_to_gpt_2():
    assert changes("gpt1", "gpt2") == [
        "vocabulary: 40,478 tokens -> 50,257 tokens",
        "context: 512 tokens -> 1,024 tokens",
        "positions: learned positions (512) -> learned positions (1,024)",
        "residual: post-norm -> pre-norm",
        "final norm: none -> yes",
    ]


def test_from_gpt_2_to_llama():
    ladder = changes("gpt2-xl", "llama-7b")
    assert "positions: learned positions (1,024) -> RoPE, theta 10,000" in ladder
    assert "norm: LayerNorm with bias, eps 1e-5 -> RMSNorm, eps 1e-6" in ladder
    assert "MLP: GELU (tanh form) of 6,400, with biases -> SwiGLU of 11,008" in ladder
    assert "attention biases: on q, k, v and the output -> none" in ladder
    assert "LM head: tied to the embedding -> untied" in ladder


def test_from_llama_1_to_2_to_3_to_3_1():
    eps = "norm: RMSNorm, eps 1e-6 -> RMSNorm, eps 1e-5"
    assert changes("llama-7b", "llama-2-7b") == ["context: 2,048 tokens -> 4,096 tokens", eps]
    assert "heads: 32 heads of 128 (MHA) -> 32 query heads of 128, 8 KV heads (GQA)" in changes(
        "llama-2-7b", "llama-3-8b"
    )
    assert changes("llama-3-8b", "llama-3.1-8b") == [
        "context: 8,192 tokens -> 131,072 tokens",
        "positions: RoPE, theta 500,000 -> "
        "RoPE, theta 500,000, llama3 scaling by 8 (wavelengths over 2,048 .. 8,192 tokens)",
    ]


def test_from_mistral_to_mixtral():
    assert changes("mistral-7b-v0.1", "mixtral-8x7b")[1:] == [
        "attention: sliding window of 4,096 -> full",
        "MLP: SwiGLU of 14,336 -> 2 of 8 experts (SwiGLU of 14,336), softmax router, weights renormalized",
    ]


def test_layers_that_differ_are_named():
    assert describe(get_spec("gemma-3-1b"))["attention"] == (
        "sliding window of 512 (layers 1-5 of every 6); full (layer 6 of every 6)"
    )
    odd = FAMILIES["qwen2"](n_layers=5, window=8, sliding=(False, False, True, False, True))
    assert by_layer(odd, lambda x: "near" if x.attn.window else "far") == "far (layers 1-2, 4); near (layers 3, 5)"


def test_what_words_leave_out_is_named_by_its_path():
    a = FAMILIES["llama"](rope=Rope(scaling=LONG))
    b = FAMILIES["llama"](rope=Rope(scaling=LongRope((1.0,) * 8, (2.0,) * 3 + (5.0,) + (2.0,) * 4, 64)))
    assert diff(a, b) == [Change("pattern[0].attn.rope.scaling.long_factor[3]", "2.0", "5.0")]
