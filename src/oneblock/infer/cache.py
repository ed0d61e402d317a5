"""The KV cache: keys and values of the tokens so far.

Shapes: B rows, K KV heads, T new tokens, S stored tokens, D head dimensions. All rows share their columns: shorter
prompts are padded on the left. A layer that stores n tokens is a ring: column c is in slot c % n.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.model import Cache

MIN_GROWTH = 256  # columns by which a full cache grows at least

StoredKV = tuple[Tensor, ...]  # keys or values (B, K, S, D); quantized: int8 and fp32 scales (B, K, S, 1)
CacheTensors = tuple[list[StoredKV], list[StoredKV], list[Tensor]]  # keys, values, positions: `KVCache.tensors`
LayerKind = tuple[int | None, int | None]  # (window, chunk): layers of one kind store the same columns


def quantize_kv(x: Tensor, quantized: bool) -> StoredKV:
    """Keys or values (B, K, T, D) as they are stored: unchanged, or in int8 with a scale per token and head."""
    if not quantized:
        return (x,)
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scale.clamp(min=1e-30)).round().to(torch.int8), scale


def dequantize_kv(stored: StoredKV, dtype: torch.dtype) -> Tensor:
    """Stored keys or values as a tensor (B, K, S, D)."""
    if len(stored) == 1:
        return stored[0]
    q, scale = stored
    return (q * scale).to(dtype)


def bytes_per_element(spec: s.Spec, dtype: torch.dtype, quantized: bool) -> float:
    """Bytes per cached number, its share of a scale included."""
    return 1 + 4 / min(x.attn.head_dim for x in spec.pattern) if quantized else dtype.itemsize


class StaticCacheView:
    """A KVCache with a free column for one more token, as a compiled decode step reads and writes it."""

    length, padded = 0, True  # the attention mask then follows from positions, never from shapes

    def __init__(self, tensors: CacheTensors, column: Tensor, kinds: list[int]):
        self.keys, self.values, self.positions = tensors
        self.column, self.kinds = column, kinds

    def begin(self, positions: Tensor) -> None:
        for x in self.positions:
            x.index_copy_(1, self.column % x.shape[1], positions)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(self.keys[layer], k), self._update(self.values[layer], v)

    def _update(self, stored: StoredKV, x: Tensor) -> Tensor:
        for buffer, new in zip(stored, quantize_kv(x, len(stored) > 1), strict=True):
            buffer.index_copy_(2, self.column % buffer.shape[2], new)
        return dequantize_kv(stored, x.dtype)

    def key_positions(self, layer: int) -> Tensor:
        return self.positions[self.kinds[layer]]

    def begin_image(self, image: Tensor | None) -> None:
        """Nothing: a compiled step runs text-only."""

    def update_image(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Nothing."""

    def image_kv(self, layer: int) -> None:
        """None."""

    def end(self) -> None:
        pass


class KVCache:
    """A dense cache of `capacity` columns that grows when it is full.

    A layer with a window or a chunk is a ring of that length and never stores more. Buffers are allocated at a layer's
    first token, and the system commits their pages as columns are written. `quantized` stores int8: half the memory
    of bf16 for some time per token.
    """

    def __init__(
        self,
        spec: s.Spec,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantized: bool = False,
    ):
        self.quantized = quantized
        self.batch, self.capacity, self.dtype, self.device = batch, max(capacity, 1), dtype, torch.device(device)
        self._attn = [layer.attn for layer in spec.layers]
        self._layer_kinds: list[LayerKind] = [(a.window, a.chunk) for a in self._attn]
        self._distinct_kinds: list[LayerKind] = list(dict.fromkeys(self._layer_kinds))
        self.kinds = [self._distinct_kinds.index(kind) for kind in self._layer_kinds]  # which positions a layer uses
        self._keys: list[StoredKV | None] = [None] * len(self._attn)
        self._values: list[StoredKV | None] = [None] * len(self._attn)
        self._positions = torch.empty(0, 0, dtype=torch.long)  # (B or 1, capacity), once a row is padded
        self._length, self._new, self._padded = 0, 0, False
        self._sizes = self._ring_sizes()
        self._key_positions: dict[LayerKind, Tensor] = {}  # of the current pass
        self._image: weakref.ref[Tensor] | None = None  # whose keys and values are stored
        self._image_kv: dict[int, tuple[StoredKV, StoredKV]] = {}  # per cross-attention layer, (B, K, S_image, D)
        self._graph_positions: list[Tensor] = []  # per kind, what a graph reads; valid at `_graph_length` columns
        self._graph_length = -1

    @property
    def length(self) -> int:
        return self._length

    @property
    def padded(self) -> bool:
        return self._padded

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values, those of an image included."""
        image = (stored for pair in self._image_kv.values() for stored in pair)
        return sum(x.nbytes for stored in (*self._keys, *self._values, *image) for x in stored or ())

    def size(self, layer: int) -> int:
        """Columns that the layer stores at most."""
        return self._sizes[layer]

    def _ring_sizes(self) -> list[int]:
        return [min([self.capacity, *(n for n in kind if n is not None)]) for kind in self._layer_kinds]

    # ------------------------------------------------------------------ one pass

    def begin(self, positions: Tensor) -> None:
        end = self._length + positions.shape[1]
        if end > self.capacity:
            self._grow(max(end, self._length + MIN_GROWTH, self._length * 3 // 2))
        self._new = positions.shape[1]
        self._key_positions.clear()
        columns = torch.arange(self._length, end, device=self.device)[None]
        self._padded = self._padded or not torch.equal(positions, columns.expand_as(positions))
        if self._padded:
            self._store_positions(positions)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(self._keys, layer, k), self._update(self._values, layer, v)

    def _update(self, layers: list[StoredKV | None], layer: int, x: Tensor) -> Tensor:
        new, start, size = quantize_kv(x.to(self.dtype), self.quantized), self._length, self._sizes[layer]
        stored = layers[layer]
        if stored is None:
            stored = layers[layer] = tuple(part.new_empty((*part.shape[:2], size, part.shape[3])) for part in new)
        if self._new > 1 and start + self._new > size:
            return self._update_full_ring(stored, new)
        for buffer, part in zip(stored, new, strict=True):
            buffer.narrow(2, start % size, self._new).copy_(part)
        return dequantize_kv(tuple(x.narrow(2, 0, min(start + self._new, size)) for x in stored), self.dtype)

    def _update_full_ring(self, rings: StoredKV, new: StoredKV) -> Tensor:
        """Return the stored columns, oldest first, and several new ones that do not fit; then store the last ones."""
        size, start, end = rings[0].shape[2], self._length, self._length + self._new
        columns, outputs = torch.arange(max(end - size, start), end, device=self.device), []
        for ring, part in zip(rings, new, strict=True):
            stored = ring.narrow(2, 0, min(start, size))
            if start > size:
                stored = stored.roll(-(start % size), 2)
            outputs.append(torch.cat((stored, part), 2) if start else part)
            ring.index_copy_(2, columns % size, part[:, :, -len(columns) :])
        return dequantize_kv(tuple(outputs), self.dtype)

    def key_positions(self, layer: int) -> Tensor:
        kind = self._layer_kinds[layer]
        if kind not in self._key_positions:
            columns = self._visible_columns(self._sizes[layer])
            self._key_positions[kind] = self._positions[:, columns] if self._padded else columns[None]
        return self._key_positions[kind]

    def _visible_columns(self, size: int) -> Tensor:
        """The columns that `update` returns in this pass, in its order."""
        start, end = self._length, self._length + self._new
        if self._new > 1 or end <= size:
            return torch.arange(max(start - size, 0) if end > size else 0, end, device=self.device)
        slots = torch.arange(size, device=self.device)
        return start - (start - slots) % size

    def _store_positions(self, positions: Tensor) -> None:
        rows = max(positions.shape[0], self._positions.shape[0])
        if self._positions.shape != (rows, self.capacity):  # the first padding, or the cache grew
            old = self._positions if len(self._positions) else torch.arange(self._length, device=self.device)[None]
            self._positions = torch.empty(rows, self.capacity, dtype=torch.long, device=self.device)
            self._positions[:, : self._length] = old[:, : self._length]
        self._positions[:, self._length : self._length + self._new] = positions

    def end(self) -> None:
        self._length += self._new
        self._new = 0

    # ------------------------------------------------------------------ image features

    def begin_image(self, image: Tensor | None) -> None:
        if image is None or self._image is None or self._image() is not image:
            self._image_kv.clear()
            self._image = None if image is None else weakref.ref(image)

    def update_image(self, layer: int, k: Tensor, v: Tensor) -> None:
        k, v = k.to(self.dtype), v.to(self.dtype)
        self._image_kv[layer] = quantize_kv(k, self.quantized), quantize_kv(v, self.quantized)

    def image_kv(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if layer not in self._image_kv:
            return None
        k, v = self._image_kv[layer]
        return dequantize_kv(k, self.dtype), dequantize_kv(v, self.dtype)

    # ------------------------------------------------------------------ saving and loading

    @property
    def text_layers(self) -> list[int]:
        """The layers that store text: all but cross-attention."""
        return [i for i, a in enumerate(self._attn) if not a.cross]

    def stored_kv(self) -> Iterator[tuple[StoredKV, StoredKV]]:
        """The stored keys and values of each text layer, in slot order."""
        for layer in self.text_layers:
            n = min(self._length, self._sizes[layer])
            keys, values = (
                tuple(x[:, :, :n].contiguous() for x in stored or ())
                for stored in (self._keys[layer], self._values[layer])
            )
            yield keys, values

    def restore(self, pairs: Iterable[tuple[StoredKV, StoredKV]], length: int) -> bool:
        """Load what `stored_kv` gave of `length` columns; False, without a change, if they do not fit."""
        if length > self.capacity or self._padded:
            return False
        self._length, self._graph_length = length, -1
        for layer, pair in zip(self.text_layers, pairs, strict=True):
            for layers, stored in zip((self._keys, self._values), pair, strict=True):
                layers[layer] = self._resize(stored, self._sizes[layer])
        return True

    # ------------------------------------------------------------------ compiled decode steps

    def tensors(self) -> CacheTensors:
        """Keys and values of every layer, and per kind of layer the position of each slot (-1: unused).

        For a graph that writes the new token itself: call it between `begin` and `end`, not in a first pass.
        """
        if self._graph_length != self._length:
            for stored in (*self._keys, *self._values):
                for x in stored or ():  # the graph multiplies unused slots by 0, and 0 * NaN is NaN
                    x[:, :, min(self._length, x.shape[2]) :].zero_()
            sizes = [self._sizes[self._layer_kinds.index(kind)] for kind in self._distinct_kinds]
            self._graph_positions = [self._slot_positions(size) for size in sizes]
        self._graph_length = self._length + self._new
        keys, values = ([x or () for x in layers] for layers in (self._keys, self._values))
        return keys, values, self._graph_positions

    @staticmethod
    def static_view(tensors: CacheTensors, column: Tensor, kinds: list[int]) -> Cache:
        """The cache inside the graph."""
        return StaticCacheView(tensors, column, kinds)

    def _slot_positions(self, size: int) -> Tensor:
        columns = torch.arange(max(self._length - size, 0), self._length, device=self.device)
        positions = self._positions[:, columns] if self._padded else columns[None]
        slots = torch.full((len(positions), size), -1, dtype=torch.long, device=self.device)
        slots[:, columns % size] = positions
        return slots

    # ------------------------------------------------------------------ resizing

    def _grow(self, capacity: int) -> None:
        """Allocate more columns. A ring shorter than its window has not wrapped yet, so slots stay."""
        self.capacity, self._graph_length = capacity, -1
        sizes, self._sizes = self._sizes, self._ring_sizes()
        for layer, (old, new) in enumerate(zip(sizes, self._sizes, strict=True)):
            if new > old:
                for layers in (self._keys, self._values):
                    layers[layer] = self._resize(layers[layer], new)

    def _resize(self, stored: StoredKV | None, size: int, rows: Tensor | None = None) -> StoredKV | None:
        """Copy the written slots (of some rows) into buffers of `size` slots; unwritten memory stays untouched."""
        if stored is None:
            return None
        resized = []
        for old in stored:
            n, batch = min(self._length, old.shape[2]), old.shape[0] if rows is None else len(rows)
            new = old.new_empty((batch, old.shape[1], size, old.shape[3]), device=self.device)
            new[:, :, :n] = old[:, :, :n] if rows is None else old[:, :, :n][rows]
            resized.append(new)
        return tuple(resized)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.device)
        self.batch, self._graph_length = len(rows), -1
        for layers in (self._keys, self._values):
            layers[:] = [self._resize(x, size, index) for x, size in zip(layers, self._sizes, strict=True)]
        if len(self._positions) > 1:
            self._positions = self._positions[index]
        for layer, pair in self._image_kv.items():
            k, v = (tuple(x[index] for x in stored) for stored in pair)
            self._image_kv[layer] = k, v
        self._image = None  # an image that is passed again has other rows: it is projected anew

    def can_rewind(self, length: int) -> bool:
        """Whether a cache of `length` columns could rewind: no ring has overwritten a column."""
        return all(length <= (n or length) for kind in self._distinct_kinds for n in kind)

    def rewind(self, length: int) -> bool:
        """Drop all columns from `length` on; False, without a change, if a ring has overwritten older ones."""
        if length > self._length or (length < self._length and any(self._length > n for n in self._sizes)):
            return False
        self._length, self._new, self._graph_length = length, 0, -1
        return True
