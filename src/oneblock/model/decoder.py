"""The one block, and the decoder that stacks it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock import spec as s
from oneblock.errors import OneblockError
from oneblock.model.attention import Attention, softcap
from oneblock.model.context import Cache, Dropout, ForwardContext
from oneblock.model.mlp import Mlp, Moe
from oneblock.model.norm import Norm
from oneblock.model.rope import sinusoids


class Block(nn.Module):
    """Two sublayers joined to the residual stream. Where the norms go:

    pre           x + f(norm(x))                      GPT-2, Llama, Mistral, Qwen
    post          norm(x + f(x))                      GPT-1
    sandwich      x + norm(f(norm(x)))                Gemma 2 and 3
    output        x + norm(f(x))                      OLMo 2
    parallel      x + attn(norm(x)) + mlp(norm(x))    Phi-1 and 2, Cohere: one norm for both
    parallel_two  x + attn(norm(x)) + mlp(norm'(x))   GPT-NeoX
    """

    def __init__(self, spec: s.Layer, dim: int, norm: s.Norm):
        super().__init__()
        self.residual = spec.residual
        self.attn = Attention(spec.attn, dim, norm)
        self.mlp = Moe(spec.mlp, dim) if isinstance(spec.mlp, s.Moe) else Mlp(spec.mlp, dim)

        def norm_if(*residuals: str) -> nn.Module:
            return Norm(norm, dim) if spec.residual in residuals else nn.Identity()

        self.attn_in = norm_if("pre", "sandwich", "parallel", "parallel_two")
        self.attn_out = norm_if("post", "sandwich", "output")
        self.mlp_in = norm_if("pre", "sandwich", "parallel_two")
        self.mlp_out = norm_if("post", "sandwich", "output")
        self.attn_gate = nn.Parameter(torch.zeros(1)) if spec.gated else None
        self.mlp_gate = nn.Parameter(torch.zeros(1)) if spec.gated else None

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        drop = ctx.dropout

        def attn(x: Tensor) -> Tensor:
            return dropped(self.attn(lowered(x), ctx, layer), drop.residual)

        def mlp(x: Tensor) -> Tensor:
            return dropped(self.mlp(lowered(x), drop.mlp), drop.residual)

        asked = ctx.asked(x)
        if self.residual == "post":
            x = self.attn_out(asked + attn(x))
            return self.mlp_out(x + mlp(x))
        if self.residual in ("parallel", "parallel_two"):
            h = lowered(self.attn_in(x))
            return asked + attn(h) + mlp(ctx.asked(h) if self.residual == "parallel" else self.mlp_in(asked))
        x = asked + gated(self.attn_out(attn(self.attn_in(x))), self.attn_gate)
        return x + gated(self.mlp_out(mlp(self.mlp_in(x))), self.mlp_gate)


class Decoder(nn.Module):
    """Token ids to logits. Everything a model of the lineage does differently is in its spec."""

    def __init__(self, spec: s.Spec):
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab + spec.embed_extra, spec.dim)
        table = spec.positions if spec.positions and spec.positions.kind == "learned" else None
        self.positions = nn.Embedding(table.length + table.offset, spec.dim) if table else None
        self.blocks = nn.ModuleList(Block(layer, spec.dim, spec.norm) for layer in spec.layers)
        self.norm = Norm(spec.norm, spec.dim) if spec.final_norm else nn.Identity()
        self.head = nn.Linear(spec.dim, spec.vocab, bias=spec.head_bias)
        self.tie()

    def tie(self) -> None:
        """Make the output matrix the input embedding, where the spec says so."""
        if self.spec.tied:
            self.head.weight = self.embed.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of its norms, and of what flows through it; matrices may be held in fewer bits."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        image: Tensor | None = None,
        documents: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab) of ids (B, T).

        `positions` (B or 1, T) default to counting on from the cache; negative ones are padding that nobody sees.
        `image` (B, S, dim) is what cross-attention layers read; without it they are skipped, as in text-only use.
        `documents` (B, T) keeps attention inside each document of a packed row.
        """
        x = self.hidden_states(ids, positions=positions, cache=cache, image=image, documents=documents, dropout=dropout)
        return self.logits(x)

    def hidden_states(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        image: Tensor | None = None,
        documents: Tensor | None = None,
        dropout: Dropout | None = None,
        last: int | None = None,
    ) -> Tensor:
        """The stream after the last norm, (B, T, dim): `forward` without the product with the vocabulary.

        `last`: of so many columns at the end only. With a cache the last layer then leaves out the others' queries.
        """
        start = 0 if cache is None else cache.length
        ordered = positions is None and documents is None and not (cache is not None and cache.padded)
        if positions is None:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
            self._check_length(start + ids.shape[1])
        if cache is not None:
            cache.begin(positions)
        ctx = ForwardContext(positions, ordered, start, cache, image, documents, dropout or Dropout())
        x = dropped(self.embedded(ids, positions), ctx.dropout.embed)
        for layer, block in enumerate(self.blocks):
            if image is None and self.spec.layers[layer].attn.cross:
                continue
            if layer == len(self.blocks) - 1 and cache is not None and last is not None and last < x.shape[1]:
                ctx = replace(ctx, last=last)
            x = block(x, ctx, layer)
        if cache is not None:
            cache.end()
        return self.norm(x if last is None else x[:, -last:])

    def embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block: (B, T) -> (B, T, dim)."""
        x = self.embed(ids)
        if self.spec.embed_scale != 1.0:  # Gemma rounds the scale to the dtype of the weights
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype, device=x.device)
        table = self.spec.positions
        if self.positions is not None and table is not None:
            return x + self.positions(positions.clamp(min=0) + table.offset)
        return x if table is None else x + sinusoids(positions, self.spec.dim).type_as(x)

    def logits(self, hidden_dim: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab)."""
        y = self.head(hidden_dim)
        y = y * self.spec.logit_scale if self.spec.logit_scale != 1.0 else y
        return softcap(y, self.spec.logit_softcap)

    def _check_length(self, length: int) -> None:
        if self.spec.positions is not None and length > self.spec.positions.length:
            raise OneblockError(
                f"{length} tokens are over the model's {self.spec.positions.length} learned positions: shorten the text"
            )


def lowered(x: Tensor) -> Tensor:
    """x as autocast's products read it, cast once instead of by each of them; without autocast x itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def dropped(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gate.tanh() * x
