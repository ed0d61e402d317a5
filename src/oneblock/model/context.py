"""State shared by all layers in one forward pass: positions, RoPE tables, masks, the KV cache, the attention backend.

Shapes: B sequences (1 where all agree), T new tokens each, N = B * T, S keys, H heads, K KV heads, D head dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.model.masked_attention import build_attention_mask, dot_product_attention
from oneblock.model.rope import rotary_table

# Which keys a query sees, as far as shapes alone tell. "causal": as many keys as queries, the lower triangle.
# "causal_lower_right": more keys than queries, which are the last ones. "explicit": `ForwardContext.attention_mask`.
MaskKind = Literal["none", "causal", "causal_lower_right", "explicit"]


@dataclass(frozen=True)
class Dropout:
    """Dropout probabilities in training."""

    embed: float = 0.0
    attn: float = 0.0  # of the attention weights
    residual: float = 0.0  # of each sublayer's output
    mlp: float = 0.0  # of the MLP's hidden activations


class Cache(Protocol):
    """Keys and values of earlier passes; `infer.cache` has implementations.

    A pass calls `begin`, then `update` once in each layer of self-attention, then `end`. Columns are token positions in
    the batch, shared by all rows; rows may start with padding.
    """

    @property
    def length(self) -> int:
        """Columns stored so far, padding included."""
        ...

    @property
    def padded(self) -> bool:
        """Whether a row starts with padding. If not, column i holds position i."""
        ...

    def begin(self, positions: Tensor) -> None:
        """Begin a pass over the next tokens at these positions, (B, T) or (1, T); negative: padding."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, K, T, D); return all that the pass attends to, (B, K, S, D)."""
        ...

    def key_positions(self, layer: int) -> Tensor:
        """Positions of the keys that `update` returns, (B, S) or (1, S); negative: padding or unused."""
        ...

    def begin_image(self, image: Tensor | None) -> None:
        """Drop stored image keys and values that are not of `image`; called by models with cross-attention."""
        ...

    def update_image(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store an image's keys and values (B, K, S_image, D) of a cross-attention layer."""
        ...

    def image_kv(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The stored image keys and values of a layer, if there are any."""
        ...

    def end(self) -> None:
        """End the pass: the new columns count from now on."""
        ...


@dataclass(frozen=True)
class SequenceLayout:
    """How the N flattened tokens of a pass divide into sequences.

    Uniform (`cu_seqlens` None): each sequence has `length` tokens, and (N, ..) views as (B, length, ..) without a copy.
    Varlen: all tokens stand in one row, `length` = N, and sequence i is tokens cu_seqlens[i] : cu_seqlens[i + 1].
    """

    batch: int  # rows
    length: int  # tokens per row
    cu_seqlens: Tensor | None = None  # (sequences + 1,) int

    def to_batch(self, x: Tensor) -> Tensor:
        """(N, heads, D) -> (B, heads, length, D), a view."""
        return x.view(self.batch, self.length, x.shape[1], x.shape[2]).transpose(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, heads, length, D) -> (N, heads, D), a view where x is stored token by token."""
        return x.transpose(1, 2).flatten(0, 1)

    def sequence_ids(self) -> Tensor | None:
        """The index of each token's sequence, (1, N); None where each row is a sequence."""
        if self.cu_seqlens is None:
            return None
        tokens = torch.arange(self.length, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), tokens, right=True)[None]


class AttentionBackend(Protocol):
    """Computes one layer's attention: the interface between the model and the fast paths in `kernels/`.

    q (N, H, D) are the queries of all new tokens, k and v (N, K, D) their keys and values, normed, rotated and not yet
    cached; the output is (N, H, D). Heads are not repeated for GQA. `ctx` describes the queries: `ctx.layout` says how
    they divide into sequences. In a prefill's last layer they are only the last ones (`logits_to_keep`), so k and v
    may have more tokens, of as many sequences.

    The backend stores k and v and reads all keys. A dense one calls `ctx.update_kv`, which returns (B, K, S, D). A
    paged one writes them into the blocks of its `ctx.cache` and reads those through `cu_seqlens` and the cache's block
    tables, so that one pass mixes a prefill chunk with decoding sequences, without padding.

    Which keys a query sees: `ctx.mask_kind(spec, S)`, and where that is "explicit", `ctx.attention_mask`.
    Cross-attention (`spec.cross`) reads all keys of an image; k and v are None where the cache has them already. Masks
    of image tokens per row will be a field of the context, which then answers "explicit" for these layers too.
    """

    def __call__(
        self,
        layer: int,
        spec: s.Attention,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        sinks: Tensor | None,
        ctx: ForwardContext,
    ) -> Tensor: ...


def reference_attention(
    layer: int,
    spec: s.Attention,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    sinks: Tensor | None,
    ctx: ForwardContext,
) -> Tensor:
    """The backend that all others equal: mask and scores materialized, T x S for each head."""
    q = ctx.layout.to_batch(q)
    keys, values = ctx.update_kv(layer, spec, k, v)
    mask = None
    if ctx.mask_kind(spec, keys.shape[2]) != "none":
        mask = ctx.attention_mask(spec, layer)
    return ctx.layout.to_tokens(dot_product_attention(q, keys, values, spec, mask, sinks, ctx.dropout.attn))


@dataclass
class ForwardContext:
    """One forward pass. Tables and masks are built once per distinct part of the spec."""

    positions: Tensor  # (B or 1, T); negative: padding
    has_default_positions: bool  # position = column and no padding: masks follow from shapes
    start: int = 0  # columns already in the cache
    cache: Cache | None = None
    image: Tensor | None = None  # (B, S_image, dim), image features for cross-attention
    documents: Tensor | None = None  # (B, T), the document of each token; attention stays inside it
    dropout: Dropout = field(default_factory=Dropout)
    backend: AttentionBackend = reference_attention
    cu_seqlens: Tensor | None = None  # boundaries of the sequences of a varlen batch, (sequences + 1,)
    batch: int | None = None  # rows; default: as many as rows of positions
    logits_to_keep: int | None = None  # this layer's output is needed for so many last columns; its keys for all

    def __post_init__(self) -> None:
        self._tables: dict[tuple[object, ...], Any] = {}
        rows, length = self.positions.shape
        self.layout = SequenceLayout(rows if self.batch is None else self.batch, length, self.cu_seqlens)
        if self.documents is None:
            self.documents = self.layout.sequence_ids()

    # ------------------------------------------------------------------ attention

    def attend(
        self, layer: int, spec: s.Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of the pass's queries (N, H, D) over all keys they see: (N, H, D). See `AttentionBackend`."""
        return self.backend(layer, spec, q, k, v, sinks, self)

    def update_kv(self, layer: int, spec: s.Attention, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store (N, K, D) of new tokens, or of an image; return all keys and values, (B, K, S, D)."""
        if k is None or v is None:
            stored = self.image_kv(layer)
            assert stored is not None, "keys are left out only where the cache has those of the image"
            return stored
        rows, (_, heads, dim) = self.layout.batch, k.shape
        k, v = k.view(rows, -1, heads, dim).transpose(1, 2), v.view(rows, -1, heads, dim).transpose(1, 2)
        if self.cache is None:
            return k, v
        if not spec.cross:
            return self.cache.update(layer, k, v)
        self.cache.update_image(layer, k, v)
        return k, v

    def image_kv(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """An image's keys and values of an earlier pass."""
        return None if self.cache is None else self.cache.image_kv(layer)

    def mask_kind(self, spec: s.Attention, n_keys: int) -> MaskKind:
        """Which mask this pass's queries need over so many keys."""
        queries = self.positions.shape[1]
        in_window = spec.window is None or n_keys <= spec.window
        in_chunk = spec.chunk is None or self.start + queries <= spec.chunk
        from_shapes = self.has_default_positions and in_window and in_chunk
        if spec.cross or (from_shapes and queries == 1):
            return "none"
        if not from_shapes or queries > n_keys:
            return "explicit"
        return "causal" if n_keys == queries else "causal_lower_right"

    def attention_mask(
        self, spec: s.Attention, layer: int, rows: slice | None = None, cols: slice | None = None
    ) -> Tensor:
        """Which keys each query sees, bool (B or 1, 1, T, S); of the queries `rows` and keys `cols` only if given."""
        if rows is None or cols is None:
            all_columns = slice(0, None)  # built here, as torch 2.11 cannot trace a slice in a default argument
            build = lambda: self._build_mask(spec, layer, all_columns, all_columns)  # noqa: E731
            return self.once("mask", build, spec.window, spec.chunk)
        return self._build_mask(spec, layer, rows, cols)  # not kept: all blocks would be quadratic in memory

    def _build_mask(self, spec: s.Attention, layer: int, rows: slice, cols: slice) -> Tensor:
        q, k = self.positions[:, rows], self.key_positions(layer)[:, cols]
        mask = build_attention_mask(q[:, :, None], k[:, None, :], spec.window, spec.chunk)
        if self.documents is not None:
            mask = mask & (self.documents[:, rows, None] == self.documents[:, None, cols])
        return mask[:, None]

    def key_positions(self, layer: int) -> Tensor:
        """Positions of a layer's keys, (B or 1, S)."""
        return self.positions if self.cache is None else self.cache.key_positions(layer)

    # ------------------------------------------------------------------ what layers share

    def rope_table(self, rope: s.Rope, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this pass's positions, (B or 1, T, 1, R / 2) each, in the dtype of the queries."""

        def build() -> tuple[Tensor, Tensor]:
            cos, sin = rotary_table(rope, head_dim, self.positions)
            return cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)

        return self.once("rope", build, rope, head_dim, dtype)

    def select_queries(self, x: Tensor) -> Tensor:
        """The columns of x (B, T, ..) whose output this layer computes."""
        return x if self.logits_to_keep is None else x[:, -self.logits_to_keep :]

    @property
    def query_context(self) -> ForwardContext:
        """This pass as the selected queries see it."""
        if self.logits_to_keep is None:
            return self
        positions = self.select_queries(self.positions)
        start = self.start + self.positions.shape[1] - positions.shape[1]
        return replace(self, positions=positions, start=start, logits_to_keep=None)

    def once(self, name: str, build: Callable[[], Any], *key: object) -> Any:
        """`build()`, called once per pass and distinct key."""
        entry = (name, *key)
        if entry not in self._tables:
            self._tables[entry] = build()
        return self._tables[entry]
