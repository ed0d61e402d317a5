"""Bytes to serve and to train a model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from oneblock.errors import OneblockError
from oneblock.plan import params
from oneblock.plan.activations import ActivationConfig, Recompute, activations
from oneblock.plan.cache import kv_bytes
from oneblock.spec import Attention, Layer, Mlp, Moe, Spec

# Bytes per weight. int8: a 16-bit scale for 32 weights; int4 likewise (the layout of llama.cpp's q8_0 and q4_0).
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0625, "int4": 0.5625}

PREFILL = 2048  # tokens that a server pushes through the model at a time
# On CPUs: what the C library's heap holds free where gradients come in other sizes than activations go, as a share of
# them, and the compiled kernels of products with their scratch; measured (docs/memory.md).
HOLES, KERNELS = 0.45, 100_000_000

LOSS_PART = 256 << 20  # bytes of logits with their gradient that the training loss works on at a time


def weight_bytes(dtype: str) -> float:
    if dtype not in BYTES:
        raise OneblockError(f"unknown dtype {dtype!r}: choose from {', '.join(BYTES)}")
    return BYTES[dtype]


def compute_bytes(dtype: str) -> int:
    """Of a cached or computed number: quantised weights are computed with in bfloat16."""
    return 4 if weight_bytes(dtype) == 4 else 2


@dataclass(frozen=True)
class Serving:
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Parallelism:
    """Ranks that share one model, by how they do (docs/parallel.md): what each then holds is less."""

    fsdp: int = 1  # every tensor is kept in so many parts, and whole while it is used
    tp: int = 1  # heads and the MLP's width, and between them the tokens
    cp: int = 1  # the tokens of a row
    ep: int = 1  # experts
    pp: int = 1  # layers

    def part(self, spec: Spec) -> Spec:
        """The model of which one rank has all."""

        def layer(x: Layer) -> Layer:
            heads, kv_heads = x.attn.n_heads // self.tp, x.attn.n_kv_heads // self.tp
            attn = replace(x.attn, n_heads=max(heads, 1), n_kv_heads=max(kv_heads, 1))
            if isinstance(x.mlp, Moe):
                return replace(x, attn=attn, mlp=replace(x.mlp, n_experts=max(x.mlp.n_experts // self.ep, 1)))
            return replace(x, attn=attn, mlp=replace(x.mlp, hidden_dim=max(x.mlp.hidden_dim // self.tp, 1)))

        spec = replace(spec, n_layers=-(-spec.n_layers // self.pp))
        return spec if self.tp == self.ep == 1 else replace(spec, pattern=tuple(map(layer, spec.pattern)))


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: what decides about memory beside its Spec."""

    dtype: str = "bfloat16"  # of the products; weights, gradients and sums are fp32
    recompute: Recompute = "none"
    optimizer: str = "adamw"  # or muon, adamw8bit
    accumulate: bool = False  # gradients of earlier batches, or their memory, are there in the next forward pass
    ema: bool = False
    cpu: bool = False
    over: Parallelism = Parallelism()


@dataclass(frozen=True)
class Training:
    """Bytes. Gradients come while activations go, so the most there is at once is less than the sum."""

    weights: int
    gradients: int
    optimizer: int  # AdamW: two moments in fp32; and the running average of the weights
    copies: int  # of the weights in 16 bits, from the forward pass to the backward pass
    activations: int
    loss: int  # what the loss needs beside the gradient of the vocabulary's matrix
    head: int  # the gradient of that matrix, which comes first
    again: int  # the embedding's own gradient, where it has to be added to one that is there
    gathered: int = 0  # of tensors kept in parts: those that are whole at the same time
    accumulate: bool = False
    cpu: bool = False

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The most there is at once: in the loss, or at the end of the backward pass."""
        before = self.gradients if self.accumulate else 0
        in_loss = before + self.copies + self.activations + self.head + self.loss
        passing = max(in_loss, self.gradients + self.again)
        heap = round(HOLES * self.gradients) + KERNELS if self.cpu else 0
        return self.weights + self.gathered + self.optimizer + passing + heap


def serving(
    spec: Spec, context: int, batch: int = 1, dtype: str = "bfloat16", image: int = 0, cpu: bool = False
) -> Serving:
    """`batch` texts of `context` tokens, all in memory at once."""
    size = compute_bytes(dtype)
    return Serving(
        weights=round(params.total(spec) * weight_bytes(dtype)),
        cache=batch * kv_bytes(spec, context, size, image),
        workspace=workspace(spec, min(batch * context, PREFILL), batch, size) + cpu * KERNELS,
    )


def workspace(spec: Spec, tokens: int, batch: int, size: int) -> int:
    """The widest moment of a forward pass over `tokens` tokens, and the fp32 logits of `batch` last ones."""
    widest = max(max(_attention_width(x.attn), _mlp_width(x.mlp)) for x in spec.layers)
    return tokens * (2 * spec.dim + widest) * size + batch * spec.vocab * (size + 4)


def _attention_width(a: Attention) -> int:
    """q, k, v before and after rotation, and the answer."""
    return (3 * a.n_heads + 4 * a.n_kv_heads) * a.head_dim


def _mlp_width(m: Mlp | Moe) -> int:
    """Gate, up and their product, for every expert a token is copied to."""
    if isinstance(m, Mlp):
        return (2 + m.gated) * m.hidden_dim
    shared = _mlp_width(m.shared) if m.shared else 0
    return max(m.top_k * _mlp_width(m.expert), shared)


def training(spec: Spec, context: int, batch: int = 1, setup: TrainingConfig = TrainingConfig()) -> Training:
    """One device, which sees `batch` texts of `context` tokens at a time. States: 16 bytes a parameter it keeps.

    4 for the weight, 4 for its gradient, 8 for AdamW's moments, all fp32 (as arXiv:1910.02054, section 3.1, counts
    them for 16-bit weights with a copy in fp32: here the 16-bit ones are the copies, and live for a part of the step).
    """
    over, size = setup.over, compute_bytes(setup.dtype)
    spec, tokens = over.part(spec), batch * context // over.cp
    count, head = params.total(spec), spec.vocab * spec.dim
    in_products = count - (spec.vocab + spec.embed_extra) * spec.dim * (1 if spec.tied else 2)
    kept = ActivationConfig(size, context, setup.cpu, over.tp)
    again = 4 * head * (1 + setup.accumulate) if spec.tied or setup.accumulate else 0
    return Training(
        weights=4 * count // over.fsdp,
        gradients=4 * count // over.fsdp,
        optimizer=(optimizer_bytes(spec, setup.optimizer) + 4 * count * setup.ema) // over.fsdp,
        copies=in_products * size if size == 2 else 0,
        activations=tokens * activations(spec, kept, setup.recompute),
        loss=loss_bytes(spec, tokens // over.tp, size, setup.cpu),
        head=4 * head,
        again=again + (gathered_at_ends(spec) if over.fsdp > 1 else 0),
        gathered=gathered_at_ends(spec) + 3 * largest_block(spec) if over.fsdp > 1 else 0,
        accumulate=setup.accumulate,
        cpu=setup.cpu,
    )


def largest_block(spec: Spec) -> int:
    """Of its weights, or of their gradients, in fp32: one block is whole while the next comes, and its gradient."""
    return 4 * max(params.layer(x, spec.dim, spec.norm).total() for x in spec.layers)


def gathered_at_ends(spec: Spec) -> int:
    """Of what is outside the blocks, which stays whole from the forward pass to the end of the backward pass."""
    return 4 * (params.total(spec) - sum(params.layer(x, spec.dim, spec.norm).total() for x in spec.layers))


def optimizer_bytes(spec: Spec, optimizer: str) -> int:
    count = params.total(spec)
    if optimizer == "adamw8bit":
        return round(count * 2 * (1 + 4 / 256))  # a byte a moment, and a scale for each 256 of them
    if optimizer == "muon":
        stacked = sum(
            x.mlp.n_experts * params.mlp(x.mlp.expert, spec.dim) for x in spec.layers if isinstance(x.mlp, Moe)
        )
        blocks = sum(params.layer(x, spec.dim, spec.norm).total() for x in spec.layers)
        return 8 * count - 4 * (blocks - stacked)  # its matrices have one moment; the few vectors are left out
    return 8 * count


def loss_bytes(spec: Spec, tokens: int, size: int, cpu: bool) -> int:
    """The vocabulary's matrix in 16 bits, the logits of one part of the tokens, and the gradient of what came in."""
    part = min(tokens, max(1, LOSS_PART // (spec.vocab * (4 + size)))) * spec.vocab
    logits = part * (size if cpu else size + 8)  # CPUs work on fp32 rows in their caches
    return (spec.vocab * spec.dim * 2 if size == 2 else 0) + logits + 2 * tokens * spec.dim * size
