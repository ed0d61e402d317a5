"""What is minimised: functions of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from oneblock.data.rows import IGNORE, Batch
from oneblock.model import Decoder, Dropout

Loss = Callable[[Decoder, Batch], Tensor]  # the mean over the batch's `count` targets


def next_token(model: Decoder, batch: Batch, dropout: Dropout | None = None) -> Tensor:
    """Cross-entropy of the token after each, in nats."""
    logits = model(batch.ids, dropout=dropout)  # (B, T, vocab), the largest tensor of a step
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)


@torch.inference_mode()
def evaluate(
    model: Decoder, batches: Iterable[Batch], precision: AbstractContextManager[object], loss: Loss = next_token
) -> float:
    """The mean loss over all targets of all batches, without dropout."""
    total, count = 0.0, 0
    device = model.embed.weight.device
    with precision:
        for batch in batches:
            total += float(loss(model, batch.to(device))) * batch.count
            count += batch.count
    return total / count
