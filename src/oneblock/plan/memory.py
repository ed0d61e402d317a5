"""Memory to serve and to train a model, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from oneblock.constants import LOSS_CHUNK_BYTES
from oneblock.errors import OneblockError
from oneblock.plan import params
from oneblock.plan.activations import ActivationCheckpointing, ActivationConfig, activations
from oneblock.plan.cache import kv_bytes
from oneblock.spec import Attention, Layer, Mlp, Moe, Spec

# Bytes per weight. int8: a 16-bit scale for 32 weights; int4 likewise (the layout of llama.cpp's q8_0 and q4_0).
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0625, "int4": 0.5625}

PREFILL = 2048  # tokens of one prefill chunk
# CPU heap overhead, measured (docs/memory.md): free memory between gradients and activations of other sizes, as a share
# of the gradients, and the compiled matmul kernels with their scratch buffers.
HEAP_FRAGMENTATION, KERNEL_SCRATCH = 0.45, 100_000_000


def weight_bytes(dtype: str) -> float:
    """Bytes per weight, scales included."""
    if dtype not in BYTES:
        raise OneblockError(f"unknown dtype {dtype!r}: choose from {', '.join(BYTES)}")
    return BYTES[dtype]


def compute_bytes(dtype: str) -> int:
    """Bytes of an activation or a cached key: quantized weights compute in bfloat16."""
    return 4 if weight_bytes(dtype) == 4 else 2


@dataclass(frozen=True)
class Serving:
    """Bytes to serve."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Parallelism:
    """Parallelism degrees (docs/parallel.md). Each one divides what a rank holds."""

    fsdp: int = 1  # every tensor is sharded, and gathered while it is used
    tp: int = 1  # heads, MLP width, and tokens between the matmuls
    cp: int = 1  # tokens of a sequence
    ep: int = 1  # experts
    pp: int = 1  # layers

    def shard_of(self, spec: Spec) -> Spec:
        """The Spec of the part that one tp, ep and pp rank holds."""

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
    """Everything that decides training memory besides the Spec."""

    dtype: str = "bfloat16"  # of the matmuls; weights, gradients and optimizer state are fp32
    activation_checkpointing: ActivationCheckpointing = "none"
    optimizer: str = "adamw"  # or muon, adamw8bit
    accumulate: bool = False  # gradients, or the memory reserved for them, are alive during the next forward pass
    ema: bool = False
    cpu: bool = False
    parallelism: Parallelism = Parallelism()


@dataclass(frozen=True)
class Training:
    """Bytes to train. Backward frees activations while it allocates gradients, so peak memory is below the sum."""

    weights: int
    gradients: int
    optimizer: int  # AdamW: two moments in fp32; and EMA weights
    low_precision_weights: int  # 16-bit copies, from the forward pass to the end of the backward pass
    activations: int
    loss: int  # the fused loss, without the gradient of the LM head
    head: int  # gradient of the LM head, which is allocated first
    embedding_grad: int  # a second gradient of the embedding, where one is added to another
    gathered: int = 0  # fsdp: tensors that are gathered at the same time
    accumulate: bool = False
    cpu: bool = False

    @property
    def states(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def loss_total(self) -> int:
        """The fused loss with the gradient of the LM head."""
        return self.loss + self.head

    @property
    def total(self) -> int:
        """Peak memory: in the loss, or at the end of the backward pass."""
        before = self.gradients if self.accumulate else 0
        in_loss = before + self.low_precision_weights + self.activations + self.loss_total
        peak = max(in_loss, self.gradients + self.embedding_grad)
        heap = round(HEAP_FRAGMENTATION * self.gradients) + KERNEL_SCRATCH if self.cpu else 0
        return self.weights + self.gathered + self.optimizer + peak + heap


def serving(
    spec: Spec, context: int, batch: int = 1, dtype: str = "bfloat16", image: int = 0, cpu: bool = False
) -> Serving:
    """Memory for `batch` sequences of `context` tokens at once, with `image` image tokens each."""
    size = compute_bytes(dtype)
    return Serving(
        weights=round(params.total(spec) * weight_bytes(dtype)),
        cache=batch * kv_bytes(spec, context, size, image),
        workspace=workspace(spec, min(batch * context, PREFILL), batch, size) + cpu * KERNEL_SCRATCH,
    )


def workspace(spec: Spec, tokens: int, batch: int, size: int) -> int:
    """Peak activations of a forward pass over `tokens` tokens, and the fp32 logits of `batch` sequences."""
    widest = max(max(_attention_width(x.attn), _mlp_width(x.mlp)) for x in spec.layers)
    return tokens * (2 * spec.dim + widest) * size + batch * spec.vocab * (size + 4)


def _attention_width(a: Attention) -> int:
    """q, k, v before and after RoPE, and the output."""
    return (3 * a.n_heads + 4 * a.n_kv_heads) * a.head_dim


def _mlp_width(m: Mlp | Moe) -> int:
    """Gate, up and their product, for each expert that a token is routed to."""
    if isinstance(m, Mlp):
        return (2 + m.gated) * m.hidden_dim
    shared = _mlp_width(m.shared) if m.shared else 0
    return max(m.top_k * _mlp_width(m.expert), shared)


def training(spec: Spec, context: int, batch: int = 1, config: TrainingConfig = TrainingConfig()) -> Training:
    """Memory of one device for micro-batches of `batch` sequences of `context` tokens.

    Weights, gradients and AdamW's moments take 4 + 4 + 8 bytes a parameter, all fp32. arXiv:1910.02054, section 3.1,
    counts 16-bit weights with an fp32 copy: here the 16-bit ones are the copies, alive for a part of the step.
    """
    parallelism, size = config.parallelism, compute_bytes(config.dtype)
    spec, tokens = parallelism.shard_of(spec), batch * context // parallelism.cp
    count, head = params.total(spec), spec.vocab * spec.dim
    in_matmuls = count - (spec.vocab + spec.embed_extra) * spec.dim * (1 if spec.tied else 2)
    ends = gathered_outside_blocks(spec) if parallelism.fsdp > 1 else 0
    return Training(
        weights=4 * count // parallelism.fsdp,
        gradients=4 * count // parallelism.fsdp,
        optimizer=(optimizer_bytes(spec, config.optimizer) + 4 * count * config.ema) // parallelism.fsdp,
        low_precision_weights=in_matmuls * size if size == 2 else 0,
        activations=tokens
        * activations(
            spec, ActivationConfig(size, context, config.cpu, parallelism.tp), config.activation_checkpointing
        ),
        loss=loss_bytes(spec, tokens // parallelism.tp, size, config.cpu),
        head=4 * head,
        embedding_grad=ends + (4 * head * (1 + config.accumulate) if spec.tied or config.accumulate else 0),
        gathered=ends + 3 * largest_block(spec) if parallelism.fsdp > 1 else 0,
        accumulate=config.accumulate,
        cpu=config.cpu,
    )


def largest_block(spec: Spec) -> int:
    """fp32 weights of the largest block: fsdp holds one block, the next one, and one block's gradients at a time."""
    return 4 * max(params.layer(x, spec.dim, spec.norm).total() for x in spec.layers)


def gathered_outside_blocks(spec: Spec) -> int:
    """fp32 bytes of embedding, LM head and final norm, which fsdp keeps gathered from forward to backward."""
    return 4 * (params.total(spec) - sum(params.layer(x, spec.dim, spec.norm).total() for x in spec.layers))


def optimizer_bytes(spec: Spec, optimizer: str) -> int:
    """Optimizer state: two fp32 moments; adamw8bit: a byte each; muon: one moment for the blocks' matrices."""
    count = params.total(spec)
    if optimizer == "adamw8bit":
        return round(count * 2 * (1 + 4 / 256))  # and an fp32 scale per 256 values
    if optimizer == "muon":
        stacked = sum(
            x.mlp.n_experts * params.mlp(x.mlp.expert, spec.dim) for x in spec.layers if isinstance(x.mlp, Moe)
        )
        blocks = sum(params.layer(x, spec.dim, spec.norm).total() for x in spec.layers)
        return 8 * count - 4 * (blocks - stacked)  # the few vectors in the blocks are not told apart
    return 8 * count


def loss_bytes(spec: Spec, tokens: int, size: int, cpu: bool) -> int:
    """The LM head in 16 bits, the logits of one chunk of tokens, and the gradient of the hidden states."""
    chunk = min(tokens, max(1, LOSS_CHUNK_BYTES // (spec.vocab * (4 + size)))) * spec.vocab
    logits = chunk * (size if cpu else size + 8)  # CPUs convert to fp32 in cache-sized rows
    return (spec.vocab * spec.dim * 2 if size == 2 else 0) + logits + 2 * tokens * spec.dim * size
