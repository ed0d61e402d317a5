"""The cost of a model, from its Spec alone: parameters, KV cache, FLOPs, bytes moved, memory, time and money."""

from __future__ import annotations

from dataclasses import dataclass

from oneblock.errors import OneblockError
from oneblock.plan import cache, flops, memory, params, training
from oneblock.plan.memory import Serving, Training, TrainingConfig
from oneblock.plan.training import BESIROGLU, GPUS, Gpu, Run, optimal_tokens
from oneblock.spec import Spec

__all__ = ["GPUS", "Gpu", "Plan", "Run", "Serving", "Training", "TrainingConfig", "plan_model", "train_run"]


@dataclass(frozen=True)
class Plan:
    """Costs of one model at one context, batch and dtype. FLOPs and decoded bytes are per token."""

    context: int
    batch: int
    dtype: str
    parts: dict[str, int]  # parameters, by part
    parts_active: dict[str, int]  # of those, the ones that one token uses
    params_total: int
    params_active: int
    kv_bytes_per_token: int  # while every layer attends to the whole sequence
    kv_bytes: int  # one sequence of `context` tokens
    flops_prefill: float
    flops_decode: float
    flops_train: float
    bytes_decode: float  # weights and cache read, keys and values written
    serving: Serving
    training: Training
    training_checkpointed: Training
    optimal_tokens: float  # 20 a parameter
    optimal_tokens_law: float  # by the fitted law

    @property
    def serving_dtype(self) -> str:
        """Dtype of activations and KV cache: quantized weights compute in bfloat16."""
        return "float32" if memory.compute_bytes(self.dtype) == 4 else "16-bit"


def plan_model(spec: Spec, context: int | None = None, batch: int = 1, dtype: str = "bfloat16", image: int = 0) -> Plan:
    """Costs of `batch` sequences of `context` tokens (None: the model's context length), `image` image tokens each."""
    context = spec.context if context is None else context
    if context < 1 or batch < 1 or image < 0:
        raise OneblockError(f"context {context}, batch {batch} and image {image} must be at least 1, 1 and 0")
    size, active = memory.compute_bytes(dtype), params.total(spec, active=True)
    return Plan(
        context=context,
        batch=batch,
        dtype=dtype,
        parts=params.by_part(spec),
        parts_active=params.by_part(spec, active=True),
        params_total=params.total(spec),
        params_active=active,
        kv_bytes_per_token=cache.kv_bytes_per_token(spec, size),
        kv_bytes=cache.kv_bytes(spec, context, size, image),
        flops_prefill=flops.prefill(spec, context, image),
        flops_decode=flops.decode(spec, context, image),
        flops_train=flops.train(spec, context, image=image),
        bytes_decode=bytes_decoded(spec, context, batch, dtype, image),
        serving=memory.serving(spec, context, batch, dtype, image),
        training=memory.training(spec, context, batch, TrainingConfig(dtype)),
        training_checkpointed=memory.training(
            spec, context, batch, TrainingConfig(dtype, activation_checkpointing="full")
        ),
        optimal_tokens=optimal_tokens(active),
        optimal_tokens_law=optimal_tokens(active, BESIROGLU),
    )


def bytes_decoded(spec: Spec, context: int, batch: int = 1, dtype: str = "bfloat16", image: int = 0) -> float:
    """Bytes moved per decoded token: a step reads the weights once per batch and each sequence's own cache."""
    size = memory.compute_bytes(dtype)
    weights = flops.weights_read(spec, batch, image) * memory.weight_bytes(dtype)
    return weights / batch + cache.kv_bytes(spec, context, size, image) + cache.kv_bytes_per_token(spec, size)


def train_run(
    spec: Spec,
    context: int | None = None,
    tokens: float | None = None,  # None: 20 a parameter
    gpu: str = "h100",
    gpus: int = 8,
    utilisation: float = 0.4,
    price: float | None = None,
    checkpointing: bool = False,
) -> Run:
    """Time and cost of a training run. Utilisation counts all FLOPs, recomputed ones too (HFU, arXiv:2205.05198)."""
    per_token = flops.train(spec, context or spec.context, checkpointing)
    tokens = optimal_tokens(params.total(spec, active=True)) if tokens is None else tokens
    return training.run(per_token, tokens, training.gpu(gpu), gpus, utilisation, price)
