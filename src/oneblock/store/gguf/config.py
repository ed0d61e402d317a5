"""GGUF metadata <-> config.json of the class: sizes, windows, flags. RoPE is in rope.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.spec import Spec
from oneblock.store.config import family_of, write_config
from oneblock.store.families.fields import layer_types
from oneblock.store.gguf import rope
from oneblock.store.gguf.architectures import ARCHITECTURES, COUNT, EXPERTS, WRITTEN_AS, Architecture
from oneblock.store.gguf.metadata import Metadata, shorten
from oneblock.store.name_tables import Family, Shape
from oneblock.store.tensors import DOWNLOAD_AGAIN

Raw = dict[str, Any]
ARCH = "general.architecture"
ZERO_IS_ABSENT = ("attention.sliding_window", COUNT, *EXPERTS)
OPTIONAL = ("attention.head_count_kv", "attention.key_length", *ZERO_IS_ABSENT)
FULL = "full_attention"
SLIDING = "sliding_attention"


def read_architecture(metadata: Mapping[str, Any]) -> str:
    name = metadata.get(ARCH)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise OneblockError(f"architecture {shorten(name)} is not supported; supported are {known}")
    return name


def read_config(values: Mapping[str, Any], shapes: Mapping[str, Shape], rope_divisors: Mapping[str, Tensor]) -> Raw:
    """The config.json of the class. `shapes`: of all tensors."""
    name = read_architecture(values)
    arch, metadata = ARCHITECTURES[name], Metadata(values, name)
    if metadata.get(COUNT):
        _check_experts(metadata, arch, shapes)
    raw: Raw = {key: _read_value(metadata, own) for own, key in arch.keys.items() if _is_present(metadata, own)}
    raw |= arch.constants
    head_dim = metadata.read_int("embedding_length") // metadata.read_int("attention.head_count")
    if "attention.key_length" in arch.keys:
        raw.setdefault("head_dim", head_dim)
    if "attention.head_count_kv" in arch.keys:
        raw.setdefault("num_key_value_heads", metadata.read_int("attention.head_count"))
    raw["vocab_size"] = shapes.get("token_embd.weight", (0,))[0]
    raw["tie_word_embeddings"] = "output.weight" not in shapes
    raw |= {key: tensor in shapes for key, tensor in arch.tensor_flags.items()}
    if arch.full_attention_every:
        raw |= _read_windows(metadata, arch, head_dim, raw)
    if arch.has_rope:
        raw |= rope.read_rope(metadata, arch, raw, rope_divisors)
    model_type = arch.model_type
    if name == "llama":
        model_type = "mixtral" if metadata.get(COUNT) else "mistral" if raw.get("sliding_window") else model_type
    class_name = family_of({"model_type": model_type}).architecture
    return {"model_type": model_type, "architectures": [class_name]} | raw


def _check_experts(metadata: Metadata, arch: Architecture, shapes: Mapping[str, Shape]) -> None:
    """Compare the number of experts with the tensors before a name is made for each."""
    if COUNT not in arch.keys:
        raise OneblockError(f"is a mixture of experts of architecture {metadata.arch!r}: get the Hugging Face folder")
    count, stack = metadata.read_int(COUNT), shapes.get("blk.0.ffn_up_exps.weight", (0,))
    if stack[0] != count:
        raise OneblockError(
            f"{metadata.arch}.{COUNT} is {count}, but the tensors hold {stack[0]} experts; {DOWNLOAD_AGAIN}"
        )


def _is_present(metadata: Metadata, key: str) -> bool:
    """Whether a key has a value; required ones count as present, and are then refused if they are not."""
    if key in ZERO_IS_ABSENT and metadata.get(key) == 0:  # Phi-4 has a sliding window of 0
        return False
    return metadata.get(key) is not None or not (key in OPTIONAL or key.endswith("softcapping"))


def _read_value(metadata: Metadata, key: str) -> int | float:
    return metadata.read_float(key) if key.endswith(("epsilon", "softcapping")) else metadata.read_int(key)


def _read_windows(metadata: Metadata, arch: Architecture, head_dim: int, raw: Raw) -> Raw:
    """Gemma's sliding layers, and the scale of its scores, which no key states."""
    key = "attention.sliding_window_pattern"
    depth, pattern = raw["num_hidden_layers"], metadata.get(key)
    if isinstance(pattern, np.ndarray) and len(pattern) == depth:
        sliding = [bool(x) for x in pattern]
    else:
        every = arch.full_attention_every if pattern is None else metadata.read_int(key)
        sliding = [(i + 1) % every != 0 for i in range(depth)]
    query_scalar = head_dim if depth == arch.dim_scaled_depth else raw["head_dim"]
    return {"layer_types": [SLIDING if x else FULL for x in sliding], "query_pre_attn_scalar": query_scalar}


# ------------------------------------------------------------------ writing


def write_metadata(spec: Spec, model_type: str | None = None) -> tuple[str, Family, Raw, dict[str, Tensor]]:
    """Architecture, class, metadata, and the divisors of the RoPE frequencies.

    `model_type`: the class to try first, for models that are of several. OneblockError if no architecture expresses
    the model.
    """
    first: OneblockError | None = None
    for family, config in _matching_classes(spec, model_type):
        try:
            return WRITTEN_AS[family.model_types[0]], family, *_write_as(spec, family, config)
        except OneblockError as error:
            first = first or error
    if first is not None:
        raise first
    known = ", ".join(sorted(WRITTEN_AS))
    raise OneblockError(f"a {write_config(spec)['model_type']} model cannot be a GGUF file; supported are {known}")


def _matching_classes(spec: Spec, first: str | None) -> Iterator[tuple[Family, Raw]]:
    """The classes that hold the model: a Phi-3 is a Llama too, but has more kinds of RoPE scaling in GGUF."""
    for model_type in sorted(WRITTEN_AS, key=lambda model_type: model_type != first):
        family = family_of({"model_type": model_type})
        try:
            config = family.config.write(spec)
            if family.config.read(config) == spec:
                yield family, config
        except (OneblockError, TypeError, ValueError, KeyError, AttributeError, StopIteration):
            continue  # the class lacks a part that the model has


def _write_as(spec: Spec, family: Family, config: Raw) -> tuple[Raw, dict[str, Tensor]]:
    name = WRITTEN_AS[family.model_types[0]]
    arch = ARCHITECTURES[name]
    values = {own: config[key] for own, key in arch.keys.items() if config.get(key) is not None}
    if "attention.key_length" in values:
        values["attention.value_length"] = values["attention.key_length"]
    if name == "phi3":
        values.setdefault("attention.sliding_window", 0)
    if arch.full_attention_every:
        values |= _write_pattern(spec, arch.full_attention_every)
    rope_values, rope_divisors = rope.write_rope(spec) if arch.has_rope else ({}, {})
    values |= rope_values | {"vocab_size": spec.vocab}
    metadata = {ARCH: name} | {f"{name}.{key}": value for key, value in values.items()}
    _check_round_trip(spec, config, metadata, rope_divisors)
    return metadata, rope_divisors


def _write_pattern(spec: Spec, default: int) -> Raw:
    """The distance of the full-attention layers if it is not llama.cpp's default."""
    kinds = layer_types(spec)
    every = kinds.index(FULL) + 1 if FULL in kinds else spec.n_layers + 1
    is_default = all((kind == FULL) == ((i + 1) % default == 0) for i, kind in enumerate(kinds))
    return {} if is_default else {"attention.sliding_window_pattern": every}


def _check_round_trip(spec: Spec, config: Raw, metadata: Raw, rope_divisors: dict[str, Tensor]) -> None:
    """Raise OneblockError unless the metadata reads back as the same model."""
    name = metadata[ARCH]
    shapes: dict[str, Shape] = {"token_embd.weight": (spec.vocab, spec.dim)}
    shapes |= {} if spec.tied else {"output.weight": (spec.vocab, spec.dim)}
    shapes |= {tensor: (0,) for key, tensor in ARCHITECTURES[name].tensor_flags.items() if config.get(key)}
    shapes |= {"blk.0.ffn_up_exps.weight": (metadata.get(f"{name}.{COUNT}", 0),)}
    raw = read_config(metadata, shapes, rope_divisors)
    family = family_of(raw)
    spec_again = family.config.read(raw)
    if spec_again == spec:
        return
    again = family.config.write(spec_again)
    key = next((key for key in config if config[key] != again.get(key)), "a part of it")
    raise OneblockError(
        f"architecture {name!r} of GGUF cannot express {key} {str(config.get(key))[:60]}; this model cannot be exported"
    )
