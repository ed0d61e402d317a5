"""Keys and values of the tokens so far.

Shapes: B rows, K KV heads, T new tokens, S kept tokens, D head dimensions. All rows share their columns: shorter
prompts are padded on the left, and column c of a layer that keeps n tokens lies in slot c % n.

What is held of them is their numbers, or of 8 bits codes and a scale for each head of a token: a tuple of tensors
(B, K, S, D or 1).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from oneblock import spec as s

BLOCK = 256  # a cache that is full grows by at least this many columns

Held = tuple[Tensor, ...]
Kind = tuple[int | None, int | None]  # (window, chunk): layers that agree here keep the same columns


def encoded(x: Tensor, coded: bool) -> Held:
    """New keys or values (B, K, T, D) as they are held."""
    if not coded:
        return (x,)
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scale.clamp(min=1e-30)).round().to(torch.int8), scale


def decoded(held: Held, dtype: torch.dtype) -> Tensor:
    if len(held) == 1:
        return held[0]
    codes, scale = held
    return (codes * scale).to(dtype)


def item_bytes(spec: s.Spec, dtype: torch.dtype, coded: bool) -> float:
    """What a number of a cache takes, with its share of a scale."""
    return 1 + 4 / min(x.attn.head_dim for x in spec.pattern) if coded else dtype.itemsize


class StaticCacheView:
    """A KVCache with a free column for one more token, as a compiled decode step reads and writes it."""

    length, padded = 0, True  # the attention mask then follows from positions, never from shapes

    def __init__(self, tensors: tuple[list[Held], list[Held], list[Tensor]], column: Tensor, kinds: list[int]):
        self.keys, self.values, self.positions = tensors
        self.column, self.kinds = column, kinds

    def begin(self, positions: Tensor) -> None:
        for x in self.positions:
            x.index_copy_(1, self.column % x.shape[1], positions)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(self.keys[layer], k), self._update(self.values[layer], v)

    def _update(self, held: Held, x: Tensor) -> Tensor:
        for into, part in zip(held, encoded(x, len(held) > 1), strict=True):
            into.index_copy_(2, self.column % into.shape[2], part)
        return decoded(held, x.dtype)

    def key_positions(self, layer: int) -> Tensor:
        return self.positions[self.kinds[layer]]

    def image_kv(self, layer: int) -> None:
        """None: a compiled step runs text-only."""

    def end(self) -> None:
        pass


class KVCache:
    """A cache for `capacity` columns, growing when there are more. A layer with a window or a chunk is a ring of
    that length and never stores more.

    Memory is reserved at a layer's first token; the system hands it out page by page as columns are written. With
    `coded` numbers are held in 8 bits: half the memory of bf16, for some time at each token.
    """

    static_view = StaticCacheView

    def __init__(
        self,
        spec: s.Spec,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        coded: bool = False,
    ):
        self.coded = coded
        self.batch, self.capacity, self.dtype, self.device = batch, max(capacity, 1), dtype, torch.device(device)
        self._attn = [layer.attn for layer in spec.layers]
        self._kinds: list[Kind] = [(a.window, a.chunk) for a in self._attn]
        self._each: list[Kind] = list(dict.fromkeys(self._kinds))
        self.kinds = [self._each.index(kind) for kind in self._kinds]  # which tensor of positions is a layer's
        self._keys: list[Held | None] = [None] * len(self._attn)
        self._values: list[Held | None] = [None] * len(self._attn)
        self._positions = torch.empty(0, 0, dtype=torch.long)  # (B or 1, capacity), where a row is padded
        self._length, self._new, self._padded = 0, 0, False
        self._sizes = self._slots()
        self._seen: dict[Kind, Tensor] = {}  # key positions of this pass
        self._image: weakref.ref[Tensor] | None = None  # whose keys and values `_image_kv` holds
        self._image_kv: dict[int, tuple[Held, Held]] = {}  # of cross-attention layers, (B, K, S_image, D)
        self._marks: list[Tensor] = []  # for graphs; as they stand when the cache has `_marked` columns
        self._marked = -1

    @property
    def length(self) -> int:
        return self._length

    @property
    def padded(self) -> bool:
        return self._padded

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values, those of an image included."""
        images = (held for pair in self._image_kv.values() for held in pair)
        return sum(x.nbytes for held in (*self._keys, *self._values, *images) for x in held or ())

    def size(self, layer: int) -> int:
        """How many columns the layer keeps."""
        return self._sizes[layer]

    def _slots(self) -> list[int]:
        return [min([self.capacity, *(n for n in kind if n is not None)]) for kind in self._kinds]

    # ------------------------------------------------------------------ one pass

    def begin(self, positions: Tensor) -> None:
        end = self._length + positions.shape[1]
        if end > self.capacity:
            self._grow(max(end, self._length + BLOCK, self._length * 3 // 2))
        self._new = positions.shape[1]
        self._seen.clear()
        columns = torch.arange(self._length, end, device=self.device)[None]
        self._padded = self._padded or not torch.equal(positions, columns.expand_as(positions))
        if self._padded:
            self._remember(positions)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(self._keys, layer, k), self._update(self._values, layer, v)

    def _update(self, all_held: list[Held | None], layer: int, x: Tensor) -> Tensor:
        new, start, size = encoded(x.to(self.dtype), self.coded), self._length, self._sizes[layer]
        held = all_held[layer]
        if held is None:
            held = all_held[layer] = tuple(part.new_empty((*part.shape[:2], size, part.shape[3])) for part in new)
        if self._new > 1 and start + self._new > size:
            return self._roll(held, new)
        for into, part in zip(held, new, strict=True):
            into.narrow(2, start % size, self._new).copy_(part)
        return decoded(tuple(part.narrow(2, 0, min(start + self._new, size)) for part in held), self.dtype)

    def key_positions(self, layer: int) -> Tensor:
        kind = self._kinds[layer]
        if kind not in self._seen:
            columns = self._columns(self._sizes[layer])
            self._seen[kind] = self._positions[:, columns] if self._padded else columns[None]
        return self._seen[kind]

    def end(self) -> None:
        self._length += self._new
        self._new = 0

    def begin_image(self, image: Tensor | None) -> None:
        if image is None or self._image is None or self._image() is not image:
            self._image_kv.clear()
            self._image = None if image is None else weakref.ref(image)

    def update_image(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._image_kv[layer] = encoded(k.to(self.dtype), self.coded), encoded(v.to(self.dtype), self.coded)

    def image_kv(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if layer not in self._image_kv:
            return None
        k, v = self._image_kv[layer]
        return decoded(k, self.dtype), decoded(v, self.dtype)

    # ------------------------------------------------------------------ on disk

    @property
    def stored_layers(self) -> list[int]:
        """Layers that keep keys: those that read an image keep none."""
        return [i for i, a in enumerate(self._attn) if not a.cross]

    def columns(self) -> Iterator[tuple[Held, Held]]:
        """What is held of keys and of values in each such layer, as the slots stand."""
        for layer in self.stored_layers:
            kept = min(self._length, self._sizes[layer])
            keys, values = (
                tuple(x[:, :, :kept].contiguous() for x in held or ())
                for held in (self._keys[layer], self._values[layer])
            )
            yield keys, values

    def fill(self, pairs: Iterable[tuple[Held, Held]], length: int) -> bool:
        """Take what `columns` gave of so many columns; False, and nothing done, where there is no room for them."""
        if length > self.capacity or self._padded:
            return False
        self._length, self._marked = length, -1
        for layer, pair in zip(self.stored_layers, pairs, strict=True):
            for mine, held in zip((self._keys, self._values), pair, strict=True):
                mine[layer] = self._longer(held, self._sizes[layer])
        return True

    # ------------------------------------------------------------------ for a graph that writes by itself

    def tensors(self) -> tuple[list[Held], list[Held], list[Tensor]]:
        """What is held of every layer; of every kind of layer the position of each column (-1: nothing there).

        To be asked for between `begin` and `end`, and not in a text's first pass: what is new is then written there.
        """
        if self._marked != self._length:
            for held in (*self._keys, *self._values):
                for x in held or ():  # a graph multiplies what nobody sees by 0, and 0 times what lay there may be NaN
                    x[:, :, min(self._length, x.shape[2]) :].zero_()
            self._marks = [self._mark(self._sizes[self._kinds.index(kind)]) for kind in self._each]
        self._marked = self._length + self._new
        keys, values = ([x for x in kept if x is not None] for kept in (self._keys, self._values))
        return keys, values, self._marks

    def _mark(self, size: int) -> Tensor:
        columns = torch.arange(max(self._length - size, 0), self._length, device=self.device)
        positions = self._positions[:, columns] if self._padded else columns[None]
        marks = torch.full((len(positions), size), -1, dtype=torch.long, device=self.device)
        marks[:, columns % size] = positions
        return marks

    # ------------------------------------------------------------------ rings

    def _roll(self, rings: Held, new: Held) -> Tensor:
        """Several tokens that do not fit: what is kept, oldest first, and the new; then the last ones are kept."""
        size, start, end = rings[0].shape[2], self._length, self._length + self._new
        columns, seen = torch.arange(max(end - size, start), end, device=self.device), []
        for ring, part in zip(rings, new, strict=True):
            kept = ring.narrow(2, 0, min(start, size))
            if start > size:
                kept = kept.roll(-(start % size), 2)
            seen.append(torch.cat((kept, part), 2) if start else part)
            ring.index_copy_(2, columns % size, part[:, :, -len(columns) :])
        return decoded(tuple(seen), self.dtype)

    def _columns(self, size: int) -> Tensor:
        """The columns that `update` returns to this pass, in its order."""
        start, end = self._length, self._length + self._new
        if self._new > 1 or end <= size:
            return torch.arange(max(start - size, 0) if end > size else 0, end, device=self.device)
        slots = torch.arange(size, device=self.device)
        return start - (start - slots) % size

    def _remember(self, positions: Tensor) -> None:
        rows = max(positions.shape[0], self._positions.shape[0])
        if self._positions.shape != (rows, self.capacity):  # the first pads, or more room; before pads column i is i
            old = self._positions if len(self._positions) else torch.arange(self._length, device=self.device)[None]
            self._positions = torch.empty(rows, self.capacity, dtype=torch.long, device=self.device)
            self._positions[:, : self._length] = old[:, : self._length]
        self._positions[:, self._length : self._length + self._new] = positions

    # ------------------------------------------------------------------ other lengths, other rows

    def _grow(self, capacity: int) -> None:
        """Room for more columns; a ring shorter than its window has not yet come round, so slots stay."""
        self.capacity, self._marked = capacity, -1
        sizes, self._sizes = self._sizes, self._slots()
        for layer, (old, new) in enumerate(zip(sizes, self._sizes, strict=True)):
            if new > old:
                for mine in (self._keys, self._values):
                    mine[layer] = self._longer(mine[layer], new)

    def _longer(self, held: Held | None, size: int) -> Held | None:
        if held is None:
            return None
        longer = tuple(x.new_empty((*x.shape[:2], size, x.shape[3]), device=self.device) for x in held)
        for new, old in zip(longer, held, strict=True):
            kept = min(self._length, old.shape[2])
            new[:, :, :kept] = old[:, :, :kept]
        return longer

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self.device)
        self.batch, self._marked = len(rows), -1
        self._keys = [self._rows(x, index) for x in self._keys]
        self._values = [self._rows(x, index) for x in self._values]
        if len(self._positions) > 1:
            self._positions = self._positions[index]
        for layer, pair in self._image_kv.items():
            k, v = (tuple(x[index] for x in held) for held in pair)
            self._image_kv[layer] = k, v
        self._image = None  # another image, or the same one with fewer rows, is projected anew

    def _rows(self, held: Held | None, index: Tensor) -> Held | None:
        if held is None:
            return None
        fewer = tuple(x.new_empty((len(index), *x.shape[1:])) for x in held)
        for new, old in zip(fewer, held, strict=True):
            kept = min(self._length, old.shape[2])  # the rest of the memory stays untouched
            new[:, :, :kept] = old[:, :, :kept][index]
        return fewer

    def can_rewind(self, length: int) -> bool:
        """Whether the cache could go back after it has had so many columns: a ring forgets what it writes over."""
        return all(length <= (n or length) for kind in self._each for n in kind)

    def rewind(self, length: int) -> bool:
        """Forget all columns from `length` on. False, and nothing done, where a ring has already dropped older ones."""
        if length > self._length or (length < self._length and any(self._length > n for n in self._sizes)):
            return False
        self._length, self._new, self._marked = length, 0, -1
        return True
