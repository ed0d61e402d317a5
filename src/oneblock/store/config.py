"""config.json <-> Spec. No tensors here, and no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from oneblock.errors import OneblockError
from oneblock.spec import Spec
from oneblock.store.families import FAMILIES
from oneblock.store.name_tables import Family

CONFIG = "config.json"
QUANTIZED = "oneblock"  # quant_method of folders that `oneblock quantize` writes


def read_config(path: str | Path) -> tuple[Spec, dict[str, Any]]:
    """The Spec of a config.json (or of its folder), and the configuration itself; of an image-text model, the text's.

    OneblockError where the class is unknown, or one of its settings is not supported or out of range.
    """
    path = Path(path)
    if not path.exists():
        raise OneblockError(f"{path}: no such folder or file; give a model's folder")
    if path.is_dir() and not (path / CONFIG).exists():
        raise OneblockError(f"{path}: has no {CONFIG}; give a model's folder")
    path = path / CONFIG if path.is_dir() else path
    try:
        config = text_config(read_json(path))
        family = family_of(config)  # first: advice about the weights is of no use where the class is unknown
        method = (config.get("quantization_config") or {}).get("quant_method")
        if config.get("quantization_config") and method != QUANTIZED:
            raise OneblockError(f"weights quantized by {method!r} are not supported; get the model in bf16 or fp32")
        if config.get("per_layer_config"):
            raise OneblockError("per_layer_config is not supported: this model cannot be loaded")
        return family.config.read(config), config
    except OneblockError as error:
        message = str(error)
        raise OneblockError(message if message.startswith(str(path)) else f"{path}: {message}") from error
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise OneblockError(f"{path}: has a value of the wrong type ({str(error)[:80]}); get the file again") from error


def write_config(spec: Spec) -> dict[str, Any]:
    """A configuration that reads back as this Spec, of the best known class that can hold it.

    Where none can, it is our own form, which no other program reads.
    """
    for family in FAMILIES:
        try:
            config = {"architectures": [family.architecture], "model_type": family.model_types[0]}
            config |= family.config.write(spec)
            # Classes have token ids as defaults: those of their first model, hardly ever this one's.
            config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            if family.config.read(config) == spec:
                return config
        except (OneblockError, TypeError, ValueError, KeyError):
            continue  # the class lacks a part that the spec has
    raise AssertionError("our own form holds every Spec")


def family_of(config: dict[str, Any]) -> Family:
    """The family that reads this configuration; OneblockError with the known ones where there is none."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = ", ".join(sorted(kind for family in FAMILIES for kind in (*family.model_types, *family.wrappers)))
    raise OneblockError(f"model_type {kind!r:.40} is not a known class; known are {known}")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration itself, or that of the text class inside an image-text model's."""
    for family in FAMILIES:
        if config.get("model_type") in family.wrappers:
            text = config.get("text_config") or {}
            outer = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
            inner = {**outer, **text, "model_type": family.model_types[0], "architectures": [family.architecture]}
            return inner | {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. NaN and Infinity, which JSON has not, are refused."""

    def refuse(constant: str) -> NoReturn:
        raise OneblockError(f"{path}: has the value {constant}, which is not a JSON number; fix it")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise OneblockError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise OneblockError(f"{path}: is not valid JSON ({str(error)[:80]}); get the file again") from error
    if not isinstance(value, dict):
        raise OneblockError(f"{path}: is not a JSON object; get the file again")
    return value
