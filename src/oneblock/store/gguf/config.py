"""A file's settings <-> config.json of the class that it is: sizes, windows, flags. Rotation is in rope.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.spec import Spec
from oneblock.store.config import family_of, write_config
from oneblock.store.families.fields import sliding_kinds
from oneblock.store.gguf import rope
from oneblock.store.gguf.metadata import Metadata, brief
from oneblock.store.gguf.names import ARCHS, COUNT, EXPERTS, WRITTEN_AS, Arch
from oneblock.store.header import AGAIN
from oneblock.store.name_tables import Family, Shape

Raw = dict[str, Any]
ARCH = "general.architecture"
MIXED = (COUNT, *EXPERTS)
FILLED = ("attention.head_count_kv", "attention.key_length", "attention.sliding_window", *MIXED)  # may be left out
FULL = "full_attention"
SLIDING = "sliding_attention"


def architecture(settings: Mapping[str, Any]) -> str:
    name = settings.get(ARCH)
    if not isinstance(name, str) or name not in ARCHS:
        raise OneblockError(f"architecture {brief(name)} is not known; known are {', '.join(sorted(ARCHS))}")
    return name


def read_config(settings: Mapping[str, Any], shapes: Mapping[str, Shape], factors: Mapping[str, Tensor]) -> Raw:
    """The configuration of the class. `shapes`: of all tensors; `factors`: the rotation's divisors by their names."""
    name = architecture(settings)
    arch, said = ARCHS[name], Metadata(settings, name)
    if said.get(COUNT):
        _check_experts(said, arch, shapes)
    raw: Raw = {key: _value(said, setting) for setting, key in arch.keys.items() if _has(said, setting)}
    raw |= arch.fixed
    width = said.whole("embedding_length") // said.whole("attention.head_count")
    if "attention.key_length" in arch.keys:
        raw.setdefault("head_dim", width)
    if "attention.head_count_kv" in arch.keys:
        raw.setdefault("num_key_value_heads", said.whole("attention.head_count"))
    raw["vocab_size"] = shapes.get("token_embd.weight", (0,))[0]
    raw["tie_word_embeddings"] = "output.weight" not in shapes
    raw |= {key: tensor in shapes for key, tensor in arch.flags.items()}
    if arch.every:
        raw |= _windowed(said, arch, width, raw)
    if arch.rotates:
        raw |= rope.read(said, arch, raw, factors)
    kind = arch.model_type
    if name == "llama":
        kind = "mixtral" if said.get(COUNT) else "mistral" if raw.get("sliding_window") else kind
    return _named(kind) | raw


def _check_experts(said: Metadata, arch: Arch, shapes: Mapping[str, Shape]) -> None:
    """Before a name is made for each: that there are as many, in an architecture that has them here."""
    if COUNT not in arch.keys:
        raise OneblockError(f"is a mixture of experts of architecture {said.arch!r}: get the model's folder")
    count, stack = said.whole(COUNT), shapes.get("blk.0.ffn_up_exps.weight", (0,))
    if stack[0] != count:
        raise OneblockError(f"{said.arch}.{COUNT} is {count}, and its tensors hold {stack[0]} experts; {AGAIN}")


def _has(said: Metadata, setting: str) -> bool:
    """Whether a setting counts: those that must be there do, absent or not."""
    if setting in ("attention.sliding_window", *MIXED) and said.get(setting) == 0:  # Phi-4's way of having none
        return False
    return said.get(setting) is not None or not (setting in FILLED or setting.endswith("softcapping"))


def _value(said: Metadata, setting: str) -> int | float:
    return said.number(setting) if setting.endswith(("epsilon", "softcapping")) else said.whole(setting)


def _named(model_type: str) -> Raw:
    return {"model_type": model_type, "architectures": [family_of({"model_type": model_type}).architecture]}


def _windowed(said: Metadata, arch: Arch, width: int, raw: Raw) -> Raw:
    """Gemma's: which layers see a window, and what scores are divided by, which no setting says."""
    depth, given = raw["num_hidden_layers"], said.get("attention.sliding_window_pattern")
    if isinstance(given, np.ndarray) and len(given) == depth:
        slides = [bool(x) for x in given]
    else:
        every = arch.every if given is None else said.whole("attention.sliding_window_pattern")
        slides = [(i + 1) % every != 0 for i in range(depth)]
    kinds = [SLIDING if x else FULL for x in slides]
    return {"layer_types": kinds, "query_pre_attn_scalar": width if depth == arch.wide else raw["head_dim"]}


# ------------------------------------------------------------------ writing


def write_settings(spec: Spec, kind: str | None = None) -> tuple[str, Family, Raw, dict[str, Tensor]]:
    """Architecture, class, settings, and the divisors of the rotation. OneblockError where no file can say it all.

    `kind`: the class to try first, for models that are of several.
    """
    first: OneblockError | None = None
    for family, config in _classes(spec, kind):
        try:
            return WRITTEN_AS[family.model_types[0]], family, *_written(spec, family, config)
        except OneblockError as error:
            first = first or error
    if first is not None:
        raise first
    known = ", ".join(sorted(WRITTEN_AS))
    raise OneblockError(f"a {write_config(spec)['model_type']} model cannot be a GGUF: this is written for {known}")


def _classes(spec: Spec, first: str | None) -> Iterator[tuple[Family, Raw]]:
    """The classes that hold the model: a Phi-3 is a Llama too, but has more kinds of rotation in a GGUF."""
    for kind in sorted(WRITTEN_AS, key=lambda kind: kind != first):
        family = family_of({"model_type": kind})
        try:
            config = family.write(spec)
            if family.read(config) == spec:
                yield family, config
        except (OneblockError, TypeError, ValueError, KeyError, AttributeError, StopIteration):
            continue  # the class lacks a part that the model has


def _written(spec: Spec, family: Family, config: Raw) -> tuple[Raw, dict[str, Tensor]]:
    name = WRITTEN_AS[family.model_types[0]]
    arch = ARCHS[name]
    settings = {setting: config[key] for setting, key in arch.keys.items() if config.get(key) is not None}
    if "attention.key_length" in settings:
        settings["attention.value_length"] = settings["attention.key_length"]
    if name == "phi3":
        settings.setdefault("attention.sliding_window", 0)
    if arch.every:
        settings |= _pattern(spec, arch.every)
    more, factors = rope.write(spec) if arch.rotates else ({}, {})
    settings = {ARCH: name} | {f"{name}.{key}": value for key, value in (settings | more).items()}
    settings |= {f"{name}.vocab_size": spec.vocab}
    _check_said(spec, config, settings, factors)
    return settings, factors


def _pattern(spec: Spec, default: int) -> Raw:
    """How often a layer sees all, where it is not as often as in the models that llama.cpp knows."""
    kinds = sliding_kinds(spec)
    every = kinds.index(FULL) + 1 if FULL in kinds else spec.n_layers + 1
    usual = all((kind == FULL) == ((i + 1) % default == 0) for i, kind in enumerate(kinds))
    return {} if usual else {"attention.sliding_window_pattern": every}


def _check_said(spec: Spec, config: Raw, settings: Raw, factors: dict[str, Tensor]) -> None:
    """That the settings read back as the same model."""
    shapes: dict[str, Shape] = {"token_embd.weight": (spec.vocab, spec.dim)}
    shapes |= {} if spec.tied else {"output.weight": (spec.vocab, spec.dim)}
    shapes |= {tensor: (0,) for key, tensor in ARCHS[settings[ARCH]].flags.items() if config.get(key)}
    shapes |= {"blk.0.ffn_up_exps.weight": (settings.get(f"{settings[ARCH]}.{COUNT}", 0),)}
    raw = read_config(settings, shapes, factors)
    back = family_of(raw).read(raw)
    if back == spec:
        return
    again = family_of(raw).write(back)
    wrong = next((key for key in config if config[key] != again.get(key)), "something of it")
    raise OneblockError(
        f"architecture {settings[ARCH]!r} of GGUF has no place for {wrong} {str(config.get(wrong))[:60]}: "
        f"this model cannot be exported"
    )
