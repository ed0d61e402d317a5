"""Options as dataclasses: checked ranges, aliases, and TOML files. `oneblock.flags` makes them a command's flags.

A field of a nested dataclass is a flag without a prefix (`--lr`), and in TOML a key of its own table (`[optimizer]`).
A class with a field `config: Path | None` can be read from a file: `--config run.toml`, which other flags override.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from oneblock.errors import OneblockError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The values that a numeric option may take: `lr: Annotated[float, Range(above=0)] = 1e-3`.

    NaN and infinity are never in range. For an optional option None is always allowed, for a tuple every element is
    checked. `check_ranges` enforces it, for flags, TOML and the Python API alike, and `--help` shows it.
    """

    low: float | None = None  # smallest value allowed
    high: float | None = None  # largest value allowed
    above: float | None = None  # exclusive lower bound
    below: float | None = None  # exclusive upper bound

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`at least 0 and below 1`."""
        words = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        return " and ".join(f"{word} {bound:,}" for word, bound in words if bound is not None)


def range_of(hint: Any) -> Range | None:
    """The `Range` in an `Annotated` hint; None where there is none."""
    return next((note for note in get_args(hint)[1:] if isinstance(note, Range)), None) if is_annotated(hint) else None


def is_annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def check_ranges(options: Any) -> None:
    """Raise OneblockError naming the first number of a dataclass, nested ones included, that is outside its Range."""
    for name, hint in hints(type(options)).items():
        value, limits = getattr(options, name), range_of(hint)
        if is_dataclass(value):
            check_ranges(value)
        elif limits is not None:
            check_range(name, value, limits, plain(hint))


def check_range(name: str, value: Any, limits: Range, hint: Any = float) -> None:
    """Raise OneblockError unless the number, or every number of a tuple, lies within the limits and has the type."""
    types_ = types_within(hint)
    if value is None and type(None) in types_:
        return
    integral, is_tuple = float not in types_, any(get_origin(t) is tuple for t in types_)
    for number in value if is_tuple and isinstance(value, tuple | list) else (value,):
        if number not in limits or (integral and not isinstance(number, int)):
            raise OneblockError(f"{name} is {number!r}, but it must be {'an integer, ' * integral}{limits}")


def types_within(hint: Any) -> set[Any]:
    """The type and all types inside it: `int | None` -> {int | None, int, NoneType}."""
    return {hint}.union(*map(types_within, get_args(hint)))


# Common spellings of the ecosystem -> our flag; each is accepted by the commands that have the flag.
FLAG_ALIASES = {
    "learning-rate": "lr",
    "grad-clip": "max-grad-norm",
    "gradient-clip": "max-grad-norm",
    "grad-accum": "gradient-accumulation-steps",
    "gradient-checkpointing": "activation-checkpointing",
    "max-iters": "steps",
    "max-steps": "steps",
    "warmup-steps": "warmup",
    "hidden-size": "dim",
    "n-embd": "dim",
    "intermediate-size": "hidden-dim",
    "num-hidden-layers": "n-layers",
    "n-layer": "n-layers",
    "num-attention-heads": "n-heads",
    "n-head": "n-heads",
    "num-key-value-heads": "n-kv-heads",
    "block-size": "context",
    "max-model-len": "context",
    "max-seq-len": "context",
    "n-ctx": "context",
    "vocab-size": "vocab",
    "max-new-tokens": "max-tokens",
    "n-predict": "max-tokens",
    "temp": "temperature",
    "repeat-penalty": "repetition-penalty",
    "speculative-model": "draft-model",
    "torch-dtype": "dtype",
    "system-prompt": "system",
    "output-dir": "out",
    "resume-from-checkpoint": "resume",
}
VALUE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

SEED = Range(0, 2**63 - 1)  # what torch.Generator.manual_seed takes without wrapping


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error: `: did you mean x?`, or nothing when no name is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {matches[0]}?" if matches else ""


def hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def plain(hint: Any) -> Any:
    """The type without its `Annotated` wrapping."""
    return get_args(hint)[0] if is_annotated(hint) else hint


# ------------------------------------------------------------------ TOML


def to_toml(obj: Any) -> str:
    """A dataclass as TOML: absent (`None`) fields are left out, nested classes are tables."""
    if not is_dataclass(obj) or isinstance(obj, type):
        raise TypeError("to_toml takes an instance of a dataclass")
    return "\n".join(table(obj, "")) + "\n"


def table(obj: Any, name: str) -> list[str]:
    values = {f.name: getattr(obj, f.name) for f in fields(obj)}
    lines = ["", f"[{name}]"] if name else []
    lines += [f"{k} = {literal(v)}" for k, v in values.items() if v is not None and not is_dataclass(v)]
    for key, value in values.items():
        if is_dataclass(value):
            lines += table(value, f"{name}.{key}" if name else key)
    return lines


def literal(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple() | list():
            return "[" + ", ".join(map(literal, value)) + "]"
    raise TypeError(f"no TOML form for {type(value).__name__}")


def load_toml(cls: type[T], path: str | Path) -> T:
    """The class from a TOML file; fields the file leaves out keep their defaults."""
    return build(cls, read_toml(path), str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. OneblockError where it cannot be read or parsed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise OneblockError(f"cannot read the configuration {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise OneblockError(f"{path} is not valid TOML: {e}") from None


def build(cls: type[T], data: dict[str, Any], where: str) -> T:
    known = {f.name: f for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    types_ = hints(cls)
    for key in data:
        if key not in known:
            tables = [name for name, hint in types_.items() if is_dataclass(plain(hint)) and key in hints(plain(hint))]
            hint = f": it belongs in the table [{tables[0]}]" if tables else nearest(key, known)
            raise OneblockError(f"{where}: unknown key {key!r}{hint}")
    for key, field in known.items():
        if key not in data and required(field):
            raise OneblockError(f"{where}: the key {key!r} is missing")
    return cls(**{key: convert(plain(types_[key]), value, f"{where}: {key}") for key, value in data.items()})


def required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def convert(hint: Any, value: Any, where: str) -> Any:
    """A TOML value as the type a field asks for; no value is silently changed into another."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build(hint, value, where)
    if origin in (Union, types.UnionType):
        return convert_any([a for a in args if a is not type(None)], value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        inner = [args[0]] * len(value) if args[-1] is ... else list(args)
        if len(inner) == len(value):
            return tuple(convert(h, v, where) for h, v in zip(inner, value, strict=True))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    expected = " or ".join(map(repr, args)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise OneblockError(f"{where} is {value!r}, but it must be {expected}")


def convert_any(choices: list[Any], value: Any, where: str) -> Any:
    for choice in choices[:-1]:
        try:
            return convert(choice, value, where)
        except OneblockError:
            continue
    return convert(choices[-1], value, where)
