"""A model too large for one device: each rank has some heads and some of the MLP's width (arXiv:1909.08053).

Started by torchrun. Ranks hold plain tensors or codes, so that products and caches are what they are on one; what they
write to the stream is added up. All ranks choose the same tokens, from the same seed. Embeddings, the output matrix,
norms and routers are whole on each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oneblock import spec as s
from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.model.attention import Attention
from oneblock.model.mlp import Experts, Mlp, Moe
from oneblock.parallel.process_group import Ranks
from oneblock.quant.formats import TILE
from oneblock.quant.linear import Float8Linear, QuantizedLinear
from oneblock.quant.quantize import Codes, QuantizedExperts

Layer = nn.Linear | Codes
ROWS, COLUMNS = 0, 1


class RowParallelLinear(nn.Module):
    """A product of which each rank has some columns."""

    def __init__(self, linear: Layer):
        super().__init__()
        self.linear, self.bias = linear, linear.bias
        linear.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        dist.all_reduce(y)
        return y if self.bias is None else y + self.bias


class Routed:
    """`Moe.routed` of experts of which each rank has some hidden numbers."""

    def __init__(self, moe: Moe):
        self.routed = moe.routed

    def __call__(self, x: Tensor, dropout: float) -> Tensor:
        y = self.routed(x, dropout)
        dist.all_reduce(y)
        return y


def check(spec: s.Spec, ranks: Ranks) -> None:
    """OneblockError where a model does not divide, with the numbers that disagree."""
    for layer in spec.pattern:
        a, mlp = layer.attn, layer.mlp
        if a.cross or a.qk_norm == "full":
            raise OneblockError("norms over all heads and cross-attention are not split over ranks: run it on one")
        if a.n_kv_heads % ranks.size and ranks.size % a.n_kv_heads:
            raise OneblockError(f"{a.n_kv_heads} KV heads do not divide by {ranks.size} ranks")
        parts = (mlp,) if isinstance(mlp, s.Mlp) else (mlp.expert, *((mlp.shared,) if mlp.shared else ()))
        for what, n in (("heads", a.n_heads), *(("hidden numbers", part.hidden_dim) for part in parts)):
            if n % ranks.size:
                raise OneblockError(f"{n} {what} do not divide by {ranks.size} ranks")


def split(model: Decoder, ranks: Ranks) -> None:
    """In place: this rank's part of every block, copied, so that the rest can go. Before `streamline`."""
    check(model.spec, ranks)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            split_attention(module, ranks)
        elif isinstance(module, Mlp):
            here = own(module.spec.hidden_dim, ranks)
            module.up = part(module.up, ROWS, here)
            module.gate = None if module.gate is None else part(module.gate, ROWS, here)
            module.down = RowParallelLinear(part(module.down, COLUMNS, here))  # type: ignore[assignment]
        elif isinstance(module, Moe):
            split_experts(module.experts, own(module.spec.expert.hidden_dim, ranks), ranks)
            module.routed = Routed(module)


def own(n: int, ranks: Ranks) -> slice:
    """Of n things this rank's; where there are fewer than ranks, the one that it shares."""
    each = max(n // ranks.size, 1)
    start = ranks.rank * n // ranks.size
    return slice(start, start + each)


def split_attention(attn: Attention, ranks: Ranks) -> None:
    a = attn.spec
    heads, kv_heads = own(a.n_heads, ranks), own(a.n_kv_heads, ranks)

    def numbers(of: slice) -> slice:
        return slice(of.start * a.head_dim, of.stop * a.head_dim)

    attn.wq = part(attn.wq, ROWS, numbers(heads))
    attn.wk, attn.wv = (part(x, ROWS, numbers(kv_heads)) for x in (attn.wk, attn.wv))
    attn.wo = RowParallelLinear(part(attn.wo, COLUMNS, numbers(heads)))  # type: ignore[assignment]
    if attn.sinks is not None:
        attn.sinks = copied(attn.sinks[heads])


def split_experts(experts: Experts | QuantizedExperts, here: slice, ranks: Ranks) -> None:
    """All experts, some of their hidden numbers; the first rank adds the last bias."""
    if isinstance(experts, QuantizedExperts):
        for name, dim in (("gate", ROWS), ("up", ROWS), ("down", COLUMNS)):
            layers = getattr(experts, name)
            if layers is not None:
                setattr(experts, name, nn.ModuleList(part(layer, dim, here) for layer in layers))
        for layer in experts.down or () if ranks.rank else ():
            layer.bias = None  # type: ignore[assignment]
        return
    for name in ("gate", "up", "gate_bias", "up_bias"):
        held = getattr(experts, name)
        setattr(experts, name, None if held is None else copied(held[:, here]))
    experts.down = copied(experts.down[:, :, here])
    experts.down_bias = None if ranks.rank else experts.down_bias


def copied(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().clone(), requires_grad=False)


# ------------------------------------------------------------------ parts of one layer


def part(layer: Layer, dim: int, here: slice) -> Any:
    """Some rows or columns of a layer, of its own kind; of some columns with its whole bias."""
    sizes = [layer.out_features, layer.in_features]
    sizes[dim] = here.stop - here.start
    with torch.device("meta"):
        new = like(layer, *sizes)
    if isinstance(layer, QuantizedLinear):
        take_codes(new, layer, dim, here)
    elif isinstance(layer, Float8Linear):
        new.codes = (layer.codes[here] if dim == ROWS else layer.codes[:, here]).clone()
        new.scale = (layer.scale[here] if dim == ROWS else layer.scale).clone()
    else:
        new.weight = copied(layer.weight[here] if dim == ROWS else layer.weight[:, here])
    if layer.bias is not None:
        new.bias = copied(layer.bias[here] if dim == ROWS else layer.bias)
    return new


def like(layer: Layer, rows: int, columns: int) -> Any:
    if isinstance(layer, QuantizedLinear):
        return QuantizedLinear(rows, columns, layer.group)
    return Float8Linear(rows, columns) if isinstance(layer, Float8Linear) else nn.Linear(columns, rows, bias=False)


def take_codes(new: QuantizedLinear, layer: QuantizedLinear, dim: int, here: slice) -> None:
    """Tiles of rows, or groups of columns."""
    unit = TILE if dim == ROWS else layer.group or TILE
    if here.start % unit or (here.stop - here.start) % unit:
        what = "rows" if dim == ROWS else "columns"
        raise OneblockError(
            f"{here.stop - here.start} {what} of codes on a rank are no multiple of {unit}: use fewer ranks"
        )

    def taken(x: Tensor, columns: int) -> Tensor:
        """Of x (tiles, pieces of so many columns, ..)."""
        if dim == ROWS:
            return x[here.start // TILE : here.stop // TILE].clone()
        return x[:, here.start // columns : here.stop // columns].clone()

    new.codes = taken(layer.codes, 32 // layer.bits)
    new.scale = taken(layer.scale, 1) if dim == ROWS else layer.scale.clone()
    new.groups = None if layer.groups is None else taken(layer.groups, layer.group)
