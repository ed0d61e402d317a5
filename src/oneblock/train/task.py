"""Tasks: the micro-batches, loss and metrics that a run optimizes. Pretraining is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from oneblock.data.packed import Batch
from oneblock.model import Decoder, Dropout
from oneblock.train.cross_entropy import cross_entropy
from oneblock.train.load_balancing import Routing

Batches = Callable[[int], Any]  # micro-batch n of this rank, with `count` and `to(device)` as `Batch` has them
LossResult = Tensor | tuple[Tensor, dict[str, Tensor]]  # the mean over `count` targets; with metrics by name
Loss = Callable[[Decoder, Any], LossResult]


class Task(nn.Module):
    """Micro-batches, a loss of (model, batch), and whatever else is trained with the model.

    Submodules (a value head, a reward head) are optimized, sharded and checkpointed as the model is, and persistent
    buffers are checkpointed. Submodules whose parameters are all frozen (a reference model) are only sharded.
    """

    def __init__(self, batches: Batches | None = None, loss: Loss | None = None):
        """Subclasses may pass neither and override the methods."""
        super().__init__()
        self.batches, self.loss_function = batches, loss

    def batch(self, n: int, model: Decoder) -> Any:
        """Micro-batch n of this rank: a function of n, the seeded random state, and perhaps the current weights."""
        assert self.batches is not None
        return self.batches(n)

    def loss(self, model: Decoder, batch: Any) -> LossResult:
        """The mean loss over the `count` targets of the batch, alone or with metrics to log."""
        assert self.loss_function is not None
        return self.loss_function(model, batch)

    def finish_step(self, is_finite: Tensor) -> None:
        """Called after the optimizer's step; `is_finite` is False where the step was skipped."""

    def close(self) -> None:
        """Release what prepares batches."""

    def trained_state(self) -> dict[str, Tensor]:
        """The part of a checkpoint that the task owns: trained parameters and buffers outside frozen submodules."""
        frozen = tuple(f"{name}." for name, module in self.named_modules() if name and is_frozen(module))
        state = self.state_dict(keep_vars=True).items()
        trained = {name: x for name, x in state if not isinstance(x, nn.Parameter) or x.requires_grad}
        return {name: x for name, x in trained.items() if not name.startswith(frozen)}


def is_frozen(module: nn.Module) -> bool:
    """Whether the module has parameters and none of them is trained."""
    params = list(module.parameters())
    return bool(params) and not any(p.requires_grad for p in params)


class Pretraining(Task):
    """Next-token prediction, with the z-loss and the load-balancing losses of mixtures of experts."""

    def __init__(
        self, batches: Batches, dropout: Dropout | None = None, z_loss: float = 0.0, routing: Routing | None = None
    ):
        super().__init__(batches)
        self.dropout, self.z_loss, self.routing = dropout, z_loss, routing

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses; the metric "loss" is the cross-entropy alone."""
        x = hidden_states(model, batch, self.dropout)
        loss, entropy = cross_entropy(model, x, batch.targets, self.z_loss)
        if self.routing is None:
            return loss, {"loss": entropy}
        aux_loss, metrics = self.routing.losses()
        return loss + aux_loss, {"loss": entropy, **metrics}

    def finish_step(self, is_finite: Tensor) -> None:
        if self.routing is not None:
            self.routing.update_expert_bias(is_finite)

    def close(self) -> None:
        if hasattr(self.batches, "close"):
            self.batches.close()  # type: ignore[union-attr]


def hidden_states(model: Decoder, batch: Batch, dropout: Dropout | None = None) -> Tensor:
    return model.hidden_states(batch.ids, positions=batch.positions, documents=batch.documents, dropout=dropout)


def next_token_loss(model: Decoder, batch: Batch, dropout: Dropout | None = None) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return cross_entropy(model, hidden_states(model, batch, dropout), batch.targets)[0]


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[Any],
    precision: AbstractContextManager[object],
    loss: Loss = next_token_loss,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """The mean loss over all targets of all batches, without dropout; `total` sums over ranks."""
    sums = torch.zeros(2, dtype=torch.float64)  # of the losses, and of the numbers of targets
    with precision:
        for batch in batches:
            value = loss(model, batch.to(model.device))
            value = value if isinstance(value, Tensor) else value[0]
            sums += torch.tensor((float(value) * batch.count, batch.count), dtype=torch.float64)
    losses, count = total(sums).tolist()
    return losses / count
