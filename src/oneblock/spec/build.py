"""Sizes that all families share, the families' builders, and limits that keep a hostile size from being built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import cycle, islice
from typing import Any, TypeVar

from oneblock.errors import OneblockError
from oneblock.spec.parts import Attention, Layer, Mlp, Moe, Norm, Rope, Spec

T = TypeVar("T")

# RoPE by base; interleaved: it rotates the pairs (0, 1), (2, 3) ..
BASE_10K = Rope(10_000.0)
BASE_500K = Rope(500_000.0)
BASE_1M = Rope(1_000_000.0)
BASE_2M = Rope(2_000_000.0)
INTERLEAVED_10K = Rope(10_000.0, interleaved=True)
INTERLEAVED_500K = Rope(500_000.0, interleaved=True)

# ------------------------------------------------------------------ limits

# Above any published model, and low enough that a 700-byte config.json cannot exhaust time or memory.
LIMITS = {"vocab": 1 << 24, "dim": 1 << 20, "n_layers": 1 << 10, "n_heads": 1 << 14, "n_kv_heads": 1 << 14}
LIMITS |= {"head_dim": 1 << 16, "hidden_dim": 1 << 24, "expert_hidden_dim": 1 << 24, "shared_hidden_dim": 1 << 24}
LIMITS |= {"dense_hidden_dim": 1 << 24, "n_experts": 1 << 14, "top_k": 1 << 14, "context": 1 << 32}
MAX_EXPERTS = 1 << 16  # over all layers


def check_limit(size: str, value: Any, name: str | None = None) -> None:
    """OneblockError where a size is not an integer between 1 and its limit. `name`: what the error calls it."""
    limit = LIMITS[size]
    if type(value) is not int or not 1 <= value <= limit:
        shown = repr(value)[:40] if type(value) is not int else f"{value:,}" if abs(value) < 1 << 64 else "above 2^64"
        raise OneblockError(f"{name or size} is {shown}, not an integer from 1 to {limit:,}; fix it")


def check_experts(n_layers: int, n_experts: int) -> None:
    if n_layers * n_experts > MAX_EXPERTS:
        total = f"{n_layers:,} layers x {n_experts:,} experts is {n_layers * n_experts:,}"
        raise OneblockError(f"{total}, above the limit of {MAX_EXPERTS:,}; use fewer")


def check_spec(spec: Spec) -> Spec:
    """The Spec itself, if its sizes are within the limits."""
    for name in ("vocab", "dim", "n_layers", "context"):
        check_limit(name, getattr(spec, name))
    check_limit("n_layers", len(spec.pattern), "pattern length")
    for layer in spec.pattern:
        mlp = layer.mlp.expert if isinstance(layer.mlp, Moe) else layer.mlp
        sizes = {name: getattr(layer.attn, name) for name in ("n_heads", "n_kv_heads", "head_dim")}
        for name, value in {**sizes, "hidden_dim": mlp.hidden_dim}.items():
            check_limit(name, value)
        if isinstance(layer.mlp, Moe):
            check_limit("n_experts", layer.mlp.n_experts)
            check_experts(spec.n_layers, layer.mlp.n_experts)
    return spec


# ------------------------------------------------------------------ builders


@dataclass(frozen=True)
class Sizes:
    """The keywords of every family's builder, with the parts they determine. The defaults are a tiny model."""

    vocab: int = 256
    dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: n_heads
    head_dim: int | None = None  # None: dim / n_heads
    hidden_dim: int | None = None  # of the MLP, or of one expert; None: by the family's rule
    context: int = 256
    norm_eps: float = 1e-5
    act: str = "silu"
    tied: bool = False

    def attention(self, rope: Rope | None = None, bias: bool | tuple[bool, bool] = False, **more: Any) -> Attention:
        n_kv_heads = self.n_kv_heads or self.n_heads
        if self.head_dim is None and self.dim % self.n_heads:
            raise OneblockError(
                f"dim {self.dim} is not divisible by n_heads={self.n_heads}: change one, or set head_dim"
            )
        if self.n_heads % n_kv_heads:
            raise OneblockError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={n_kv_heads}: change one")
        head_dim = self.head_dim or self.dim // self.n_heads
        biases = (bias, bias) if isinstance(bias, bool) else bias
        return Attention(self.n_heads, n_kv_heads, head_dim, rope, bias=biases, **more)

    def gated_mlp(self, **more: Any) -> Mlp:
        return Mlp(self.hidden_dim or gated_hidden_dim(self.dim), self.act, **more)

    def plain_mlp(self, bias: bool = True) -> Mlp:
        return Mlp(self.hidden_dim or 4 * self.dim, self.act, gated=False, bias=bias)

    def layer_norm(self, bias: bool = False) -> Norm:
        return Norm("layer", self.norm_eps, bias)

    def decoder(self, *layers: Layer, norm: Norm | None = None, **more: Any) -> Spec:
        """The Spec of a decoder that repeats these layers over its depth. `norm`: an RMSNorm if None."""
        pattern = fold_layers(repeat_to_depth(layers, self.n_layers))
        norm = norm or Norm(eps=self.norm_eps)
        common = {"context": self.context, "norm": norm, "tied": self.tied}
        return Spec(self.vocab, self.dim, self.n_layers, pattern, **{**common, **more})


@dataclass(frozen=True)
class Builder:
    """A family's function from keywords to a Spec."""

    name: str
    build: Callable[..., Spec]  # of the Sizes and of the family's own keywords
    keywords: Mapping[str, Any]  # every keyword and its default

    def __call__(self, **keywords: Any) -> Spec:
        """OneblockError where a keyword is unknown or a size is above its limit."""
        for key in keywords:
            if key not in self.keywords:
                raise OneblockError(unknown_name(f"{self.name} keyword", key, self.keywords))
        values = {**self.keywords, **keywords}
        for key, value in values.items():
            if key in LIMITS and value is not None:
                check_limit(key, value)
        check_experts(values["n_layers"], values.get("n_experts", 1))
        return self.build(Sizes(**{key: values.pop(key) for key in COMMON}), **values)


COMMON = tuple(asdict(Sizes()))


def family(**defaults: Any) -> Callable[[Callable[..., Spec]], Builder]:
    """Make a Builder of a function of the `Sizes` and of keywords. `defaults` replace those of `Sizes`."""

    def decorate(build: Callable[..., Spec]) -> Builder:
        own = {name: p.default for name, p in list(inspect.signature(build).parameters.items())[1:]}
        return Builder(build.__name__, build, {**asdict(Sizes(**defaults)), **own})

    return decorate


@dataclass(frozen=True)
class Model:
    """A published model: `FAMILIES[family](**kwargs)` is its Spec."""

    name: str
    title: str
    family: str
    kwargs: dict[str, Any]


SIZE_COLUMNS = ("vocab", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "context")


def model(family: str, name: str, title: str, *sizes: int | None, **more: Any) -> Model:
    """A row of a family's table of published sizes: the columns of SIZE_COLUMNS, then other keywords."""
    return Model(name, title, family, {**dict(zip(SIZE_COLUMNS, sizes, strict=True)), **more})


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """An error for a name that is not one of the known ones, with the nearest of them."""
    near = get_close_matches(name.lower(), list(known), n=1, cutoff=0.4)
    return f"unknown {kind} {name!r}" + (f": did you mean {near[0]!r}?" if near else "")


# ------------------------------------------------------------------ layers and numbers


def gated_hidden_dim(dim: int) -> int:
    """8/3 dim, rounded up to a multiple of 32: three matrices cost as much as two of 4 dim (arXiv:2002.05202)."""
    return 32 * math.ceil(dim * 8 / 3 / 32)


def repeat_to_depth(values: Sequence[T], n_layers: int) -> tuple[T, ...]:
    """One value per layer: the values in turn, repeated and cut off at the depth."""
    return tuple(islice(cycle(values), n_layers))


def fold_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The shortest pattern that gives these layers when it is repeated and cut off at the depth: ABABA -> AB."""
    numbers: dict[Layer, int] = {}
    ids = [numbers.setdefault(layer, len(numbers)) for layer in layers]
    length = next(n for n in range(1, len(ids) + 1) if ids[n:] == ids[: len(ids) - n])
    return tuple(layers[:length])


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's default attention factor (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """LongRoPE's default attention factor (arXiv:2402.13753)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_context))
