"""Every class gives the reference's logits; and every field of every Spec is needed for that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.model import Decoder
from oneblock.store import load_model, save_model
from oneblock.store.load import build_on_meta, parameter_shapes

TOLERANCE = 1e-4


def ours(model: Decoder, run: Any) -> Tensor:
    with torch.no_grad():
        return model(run.ids, image=run.image)


def distance(model: Decoder, reference: Any) -> float:
    """The largest difference over all runs; infinite where ours is NaN."""
    pairs = zip(reference.runs, reference.logits, strict=True)
    return max((ours(model, run) - theirs).abs().nan_to_num(torch.inf).max().item() for run, theirs in pairs)


def test_logits_equal_the_reference(reference: Any) -> None:
    assert distance(load_model(reference.folder).model, reference) < TOLERANCE


def test_saving_gives_the_reference_its_own_tensors(reference: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    checkpoint = load_model(reference.folder)
    save_model(tmp_path / "saved", checkpoint)
    before = load_file(reference.folder / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    for name in ("config.json", "generation_config.json"):
        stored = [json.loads((folder / name).read_text()) for folder in (reference.folder, tmp_path / "saved")]
        assert stored[0] == stored[1]


# ------------------------------------------------------------------ mutations

# Values for fields that are None, and the choices of names. Numbers grow and flags flip by themselves.
ABSENT: dict[str, Any] = {
    "rope": s.Rope(),
    "window": 5,
    "chunk": 5,
    "scale": 0.77,
    "softcap": 1.5,
    "temperature_tuning": (4.0, 0.5),
    "clamp": 0.2,
    "scaling": s.LinearScaling(2.0),
    "positions": s.Positions(96, "sinusoidal"),
    "logit_softcap": 1.5,
    "dim": 4,
    "qk_norm": "l2",
    "shared": s.Mlp(8),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("rms", "layer"),
    "act": ("gelu", "gelu_tanh", "silu", "relu"),
    "score_func": ("softmax", "sigmoid"),
    "qk_norm": ("head", "full", "l2"),
    "residual": ("pre", "post", "sandwich", "output", "parallel", "parallel_two"),
}

# Changes that cannot show in these logits, and why.
INVISIBLE = {
    r"^context$": "limits the length of a text, and nothing else",
    r"^norm\.scale_in_fp32$": "rounding below fp32",
    r"\.mlp\.(clamp|up_offset)$@plain": "acts on gated MLPs only",
    r"\.attn\.(window|chunk)$@cross": "all of the image is visible",
    r"\.attn\.scale=None$@default": "says what the default is",
}


def changed(value: Any, path: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """Every single change of one field: (what, new value)."""
    name = path.rpartition(".")[2]
    if is_dataclass(value):
        for field in fields(value):
            own, inner = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
            changes = changed(own, inner, value)
            if own is not None and "None" in str(field.type):
                changes = chain([(f"{inner}=None", None)], changes)
            for what, new in changes:
                yield what, replace(value, **{field.name: new})  # pyright: ignore[reportArgumentType]
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            for what, new in changed(item, f"{path}[{i}]" if is_dataclass(item) else path, owner):
                yield what, (*value[:i], new, *value[i + 1 :])
    elif value is None:
        yield path, ABSENT[name]
    elif isinstance(value, bool):
        yield path, not value
    elif isinstance(value, str):
        options = [x for x in CHOICES[name] if x != value]
        yield from ((f"{path}={x}", x) for x in options)
    elif isinstance(value, int):
        yield path, value * 2 if name.endswith("context") else value + 1
    else:
        yield path, value * (100 if name == "eps" else 2) or 0.3


def parts_of(spec: s.Spec, path: str) -> tuple[s.Attention, s.Mlp | s.Moe] | None:
    layer = re.match(r"pattern\[(\d+)\]", path)
    return None if layer is None else (spec.pattern[int(layer[1])].attn, spec.pattern[int(layer[1])].mlp)


def invisible(spec: s.Spec, what: str) -> bool:
    parts = parts_of(spec, what)
    tags = {""}
    if parts is not None:
        attn, mlp = parts
        tags |= {"@cross"} if attn.cross else set()
        tags |= {"@plain"} if isinstance(mlp, s.Mlp) and not mlp.gated else set()
        tags |= {"@default"} if attn.scale == attn.head_dim**-0.5 else set()
    path = what if what.endswith("=None") and "scale" in what else what.partition("=")[0]
    patterns = [key.partition("@") for key in INVISIBLE]
    return any(re.search(p, path) and (at + tag if tag else "") in tags for p, at, tag in patterns)


def noticed(reference: Any, model: Decoder, mutant: s.Spec) -> bool:
    """Whether a changed spec has other parameters, does not fit its tensors, or gives other logits.

    Every mutant can be built. The one failure that may occur when it runs is a RoPE table, or the keys of an image,
    whose size does not match the heads'.
    """
    other = build_on_meta(mutant)
    if parameter_shapes(other) != parameter_shapes(model):
        return True
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie()
    try:
        return distance(other, reference) > TOLERANCE
    except RuntimeError as error:
        if not re.search(r"size of tensor a \(\d+\) must match the size of tensor b", str(error)):
            raise
        return True


def test_every_field_matters(reference: Any) -> None:
    model = load_model(reference.folder).model
    assert distance(model, reference) < TOLERANCE
    changes = list(changed(model.spec, "", None))
    unnoticed = [
        what for what, mutant in changes if not invisible(model.spec, what) and not noticed(reference, model, mutant)
    ]
    assert len(changes) > 30
    assert not unnoticed


def test_the_exceptions_are_true_and_all_used(reference: Any) -> None:
    """What is listed as invisible is: otherwise the list hides something."""
    model = load_model(reference.folder).model
    hidden = [(what, mutant) for what, mutant in changed(model.spec, "", None) if invisible(model.spec, what)]
    assert hidden
    assert not [what for what, mutant in hidden if noticed(reference, model, mutant)]
