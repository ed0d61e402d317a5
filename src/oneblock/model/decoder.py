"""The one block, and the decoder that stacks it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock import spec as s
from oneblock.errors import OneblockError
from oneblock.model.attention import Attention
from oneblock.model.context import AttentionBackend, Cache, Dropout, ForwardContext, reference_attention
from oneblock.model.masked_attention import apply_softcap
from oneblock.model.mlp import Mlp, Moe
from oneblock.model.norm import Norm
from oneblock.model.rope import sinusoids


class Block(nn.Module):
    """Attention and MLP sublayers on the residual stream. Where the norms are:

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
            return apply_dropout(self.attn(x, ctx, layer), drop.residual)

        def mlp(x: Tensor) -> Tensor:
            return apply_dropout(self.mlp(x, drop.mlp), drop.residual)

        queries = ctx.select_queries(x)
        if self.residual == "post":
            x = self.attn_out(queries + attn(x))
            return self.mlp_out(x + mlp(x))
        if self.residual in ("parallel", "parallel_two"):
            h = self.attn_in(x)
            mlp_input = ctx.select_queries(h) if self.residual == "parallel" else self.mlp_in(queries)
            return queries + attn(h) + mlp(mlp_input)
        x = queries + apply_gate(self.attn_out(attn(self.attn_in(x))), self.attn_gate)
        return x + apply_gate(self.mlp_out(mlp(self.mlp_in(x))), self.mlp_gate)


class Decoder(nn.Module):
    """Token ids to logits. Every difference between the supported models is in the spec."""

    def __init__(self, spec: s.Spec):
        super().__init__()
        self.spec = spec
        self.attention_backend: AttentionBackend = reference_attention  # kernels.use_fast_kernels sets a fast one
        self.embed = nn.Embedding(spec.vocab + spec.embed_extra, spec.dim)
        table = spec.positions if spec.positions and spec.positions.kind == "learned" else None
        self.positions = nn.Embedding(table.length + table.offset, spec.dim) if table else None
        self.blocks = nn.ModuleList(Block(layer, spec.dim, spec.norm) for layer in spec.layers)
        self.norm = Norm(spec.norm, spec.dim) if spec.final_norm else nn.Identity()
        self.head = nn.Linear(spec.dim, spec.vocab, bias=spec.head_bias)
        self.tie()

    def tie(self) -> None:
        """Share the embedding's weight with the LM head, if the spec ties them."""
        if self.spec.tied:
            self.head.weight = self.embed.weight

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype. Weight matrices may be quantized."""
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

        `positions` (B or 1, T) default to the columns that follow the cache's; negative ones are padding.
        `image` (B, S, dim): image features for cross-attention layers, which are skipped without them. With a cache
        their keys and values are computed once; later passes may leave the image out.
        `documents` (B, T): the document of each token of a packed row; attention stays inside it.
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
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """The output of the final norm, (B, T, dim): `forward` without the LM head.

        `logits_to_keep`: return this many last columns. With a cache, the last layer then computes only their queries.
        """
        start = 0 if cache is None else cache.length
        default = positions is None and documents is None and not (cache is not None and cache.padded)
        if positions is None:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
            self._check_length(start + ids.shape[1])
        if cache is not None:
            if self.has_cross_attention and (image is not None or start == 0):
                cache.begin_image(image)
            cache.begin(positions)
        features = None if image is None else image.expand(ids.shape[0], -1, -1)
        shared = (positions, default, start, cache, features, documents, dropout or Dropout(), self.attention_backend)
        ctx = ForwardContext(*shared, batch=ids.shape[0])
        x = apply_dropout(self.embed_tokens(ids, positions), ctx.dropout.embed)
        x = self._run_blocks(x, ctx, logits_to_keep)
        if cache is not None:
            cache.end()
        return self.norm(x if logits_to_keep is None else x[:, -logits_to_keep:])

    def _run_blocks(self, x: Tensor, ctx: ForwardContext, logits_to_keep: int | None) -> Tensor:
        """All blocks in order; cross-attention is skipped without an image."""
        for layer, block in enumerate(self.blocks):
            if self.spec.layers[layer].attn.cross and ctx.image is None and ctx.image_kv(layer) is None:
                continue
            is_last = layer == len(self.blocks) - 1
            if is_last and ctx.cache is not None and logits_to_keep is not None and logits_to_keep < x.shape[1]:
                ctx = replace(ctx, logits_to_keep=logits_to_keep)
            x = block(x, ctx, layer)
        return x

    @property
    def has_cross_attention(self) -> bool:
        return any(layer.attn.cross for layer in self.spec.pattern)

    def embed_tokens(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The input of the first block: (B, T) -> (B, T, dim)."""
        x = self.embed(ids)
        if self.spec.embed_scale != 1.0:  # Gemma rounds the scale to the dtype of the weights
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype, device=x.device)
        table = self.spec.positions
        if self.positions is not None and table is not None:
            return x + self.positions(positions.clamp(min=0) + table.offset)
        return x if table is None else x + sinusoids(positions, self.spec.dim).type_as(x)

    def logits(self, x: Tensor) -> Tensor:
        """The LM head: hidden states (.., dim) -> (.., vocab)."""
        y = self.head(x)
        y = y * self.spec.logit_scale if self.spec.logit_scale != 1.0 else y
        return apply_softcap(y, self.spec.logit_softcap)

    def _check_length(self, length: int) -> None:
        if self.spec.positions is not None and length > self.spec.positions.length:
            raise OneblockError(
                f"{length} tokens exceed the model's {self.spec.positions.length} position embeddings; "
                f"shorten the sequence to {self.spec.positions.length}"
            )


def apply_dropout(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def apply_gate(x: Tensor, gate: Tensor | None) -> Tensor:
    """Scale a sublayer's output by tanh of its gate, if it has one."""
    return x if gate is None else gate.tanh() * x
