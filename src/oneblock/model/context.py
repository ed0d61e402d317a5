"""What the layers share in one forward pass.

Shapes: B batch (or 1, when all rows agree), T new tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.model.rope import rotary_table


@dataclass(frozen=True)
class Dropout:
    """Probabilities with which parts of the stream are zeroed while training."""

    embed: float = 0.0
    attn: float = 0.0  # of the attention's weights
    residual: float = 0.0  # of what a sublayer adds to the stream
    mlp: float = 0.0  # of the feed-forward's hidden activations


class Cache(Protocol):
    """Keys and values of the tokens so far, for every layer; `infer.cache` has the kinds."""

    @property
    def length(self) -> int:
        """Tokens (columns) so far, pads included."""
        ...

    @property
    def padded(self) -> bool:
        """Whether some row starts with padding; if not, column i holds position i."""
        ...

    def begin(self, positions: Tensor) -> None:
        """Announce the positions of the next tokens, (B, T) or (1, T); negative: padding."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) and return all that these tokens may see, (B, K, S, D)."""
        ...

    def key_positions(self, layer: int) -> Tensor:
        """The positions of the keys that `update` returns, (B, S) or (1, S); negative: nothing there."""
        ...

    def end(self) -> None:
        """The forward pass is over."""
        ...


@dataclass
class ForwardContext:
    """One forward pass: positions, and each table built once per distinct part of the spec."""

    positions: Tensor  # (B, T)
    ordered: bool  # row i of every sequence is token i of its text, nothing is padded: masks follow from shapes
    start: int = 0  # columns already in the cache
    cache: Cache | None = None
    image: Tensor | None = None  # (B, S_image, dim), what cross-attention reads
    documents: Tensor | None = None  # (B, T), the document each token belongs to; attention stays inside it
    dropout: Dropout = Dropout()
    last: int | None = None  # of this layer only so many columns at the end are read; of the others keys and values

    def __post_init__(self) -> None:
        self._tables: dict[tuple[object, ...], Any] = {}

    def asked(self, x: Tensor) -> Tensor:
        """The columns of x (B, T, ..) that go on after this layer."""
        return x if self.last is None else x[:, -self.last :]

    @property
    def asking(self) -> ForwardContext:
        """The step as those columns' queries see it."""
        if self.last is None:
            return self
        earlier = self.positions.shape[1] - self.last
        return replace(self, positions=self.asked(self.positions), start=self.start + earlier, last=None)

    def rotary(self, rope: s.Rope, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for this pass, (B, 1, T, R / 2), in the dtype of the queries."""

        def build() -> tuple[Tensor, Tensor]:
            cos, sin = rotary_table(rope, head_dim, self.positions)
            return cos[:, None].to(dtype), sin[:, None].to(dtype)

        return self._once(("rotary", rope, head_dim, dtype), build)

    def sees(self, a: s.Attention, keys: int) -> Literal["all", "causal", "later", "mask"]:
        """Which keys the queries see, where the shapes alone tell: all, the lower triangle, or ask `mask`.

        "later" is the triangle's lower part: keys of earlier passes, which all queries see, come before their own.
        """
        queries = self.positions.shape[1]
        near = (a.window is None or keys <= a.window) and (a.chunk is None or self.start + queries <= a.chunk)
        if a.cross or (self.ordered and near and queries == 1):
            return "all"
        if not (self.ordered and near and queries <= keys):
            return "mask"
        return "causal" if keys == queries else "later"

    def mask(self, a: s.Attention, layer: int, rows: slice, cols: slice) -> Tensor:
        """Which keys each query sees: bool (B, 1, rows, cols)."""

        def build() -> Tensor:
            q, k = self.positions[:, rows], self.key_positions(layer)[:, cols]
            mask = visible(q[:, :, None], k[:, None, :], a.window, a.chunk)
            if self.documents is not None:
                mask = mask & (self.documents[:, rows, None] == self.documents[:, None, cols])
            return mask[:, None]

        if rows.stop - rows.start < self.positions.shape[1]:
            return build()  # one of many blocks: keeping them all would be quadratic in memory
        return self._once(("mask", a.window, a.chunk), build)

    def key_positions(self, layer: int) -> Tensor:
        return self.positions if self.cache is None else self.cache.key_positions(layer)

    def shared(self, name: str, a: s.Attention, build: Callable[[], Any]) -> Any:
        """`build()`, once per pass and distinct (window, chunk)."""
        return self._once((name, a.window, a.chunk), build)

    def _once(self, key: tuple[object, ...], build: Callable[[], Any]) -> Any:
        if key not in self._tables:
            self._tables[key] = build()
        return self._tables[key]


def visible(q: Tensor, k: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Whether a query at position q sees a key at position k; broadcasts.

    Padding queries see everything: their output is never read, but a row that sees nothing would be NaN.
    """
    mask = (k <= q) & (k >= 0)
    if window is not None:
        mask = mask & (k > q - window)
    if chunk is not None:
        mask = mask & (k // chunk == q // chunk)
    return mask | (q < 0)
