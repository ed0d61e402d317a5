"""Our own folder form, for architectures that no Hugging Face class can hold: the Spec itself, and our names."""

from __future__ import annotations

import dataclasses
from typing import Any

from oneblock import spec as parts
from oneblock.errors import OneblockError
from oneblock.spec import Spec
from oneblock.spec.build import check_spec
from oneblock.store.name_tables import Family, prefix_names

CLASSES: dict[str, Any] = {
    name: getattr(parts, name) for name in parts.__all__ if dataclasses.is_dataclass(getattr(parts, name))
}


class SpecConfig:
    """{"part": class, field: value ..}, with lists for tuples."""

    def read(self, raw: dict[str, Any]) -> Spec:
        spec = _read(raw.get("spec"))
        if not isinstance(spec, Spec):
            raise OneblockError("its spec is not that of a model; get the folder again")
        return check_spec(spec)

    def write(self, spec: Spec) -> dict[str, Any]:
        return {"spec": _write(spec)}


def _write(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _write(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"part": type(value).__name__, **fields}
    return [_write(x) for x in value] if isinstance(value, tuple) else value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(x) for x in value)
    if not isinstance(value, dict):
        return value
    name = value.get("part")
    if name not in CLASSES:
        raise OneblockError(f"its spec has the unknown part {name!r}; it may come from a newer version: upgrade")
    return CLASSES[name](**{key: _read(x) for key, x in value.items() if key != "part"})


MODULES = ("attn.wq", "attn.wk", "attn.wv", "attn.wo", "attn.q_norm", "attn.k_norm", "attn.sinks", "attn_in")
MODULES += ("attn_out", "mlp_in", "mlp_out", "attn_gate", "mlp_gate", "mlp.gate", "mlp.up", "mlp.down", "mlp.router")
MODULES += tuple(f"mlp.experts.{x}" for x in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"))
MODULES += ("mlp.shared.gate", "mlp.shared.up", "mlp.shared.down", "mlp.shared_gate")
NAMES = {x: x for x in ("embed", "positions", "norm", "head")}
NAMES |= prefix_names("blocks.{n}.", {x: x for x in MODULES})

FAMILIES = (Family(("oneblock",), "Decoder", SpecConfig(), (NAMES,), prefix=""),)
