"""What is minimised: functions of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from oneblock.data.packed import Batch
from oneblock.model import Decoder, Dropout
from oneblock.train.cross_entropy import cross_entropy
from oneblock.train.load_balancing import Routing

# What to minimise, the mean over the batch's `count` targets; or that and what to show beside it, by name
Loss = Callable[[Decoder, Batch], Tensor | tuple[Tensor, dict[str, Tensor]]]


def next_token(model: Decoder, batch: Batch, dropout: Dropout | None = None) -> Tensor:
    """Cross-entropy of the token after each, in nats."""
    x = model.hidden_states(batch.ids, positions=batch.positions, documents=batch.documents, dropout=dropout)
    return cross_entropy(model, x, batch.targets)[0]


def pretraining(
    model: Decoder,
    batch: Batch,
    dropout: Dropout | None = None,
    z_loss: float = 0.0,
    routing: Routing | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with what keeps logits small and experts busy; "loss" shows the cross-entropy alone."""
    x = model.hidden_states(batch.ids, positions=batch.positions, documents=batch.documents, dropout=dropout)
    loss, entropy = cross_entropy(model, x, batch.targets, z_loss)
    if routing is None:
        return loss, {"loss": entropy}
    extra, seen = routing.losses()
    return loss + extra, {"loss": entropy, **seen}


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[Batch],
    precision: AbstractContextManager[object],
    loss: Loss = next_token,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """The mean loss over all targets of all batches, without dropout; `total` adds up over ranks."""
    device = model.device
    found = torch.zeros(2, dtype=torch.float64)  # the losses' sum, and of how many targets
    with precision:
        for batch in batches:
            value = loss(model, batch.to(device))
            value = value if isinstance(value, Tensor) else value[0]
            found += torch.tensor((float(value) * batch.count, batch.count), dtype=torch.float64)
    losses, count = total(found).tolist()
    return losses / count
