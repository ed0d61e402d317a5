"""Small tasks that own a value head, keep a frozen reference model, or sample batches from the current model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oneblock.data.packed import Batch
from oneblock.model import Decoder
from oneblock.train.cross_entropy import token_logprobs
from oneblock.train.task import Batches, Task, hidden_states


class ValueHeadTask(Task):
    """Next-token prediction near a reference model, and a value head that predicts a function of the next token."""

    steps: Tensor

    def __init__(self, model: Decoder, batches: Batches, seed: int = 0):
        super().__init__(batches)
        self.reference = deepcopy(model).requires_grad_(False)
        self.value_head = nn.Linear(model.spec.dim, 1)
        nn.init.normal_(self.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.value_head.bias)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = hidden_states(model, batch)
        logprobs = token_logprobs(x, model.head, batch.targets, temperature=0.7)
        with torch.no_grad():
            reference_x = hidden_states(self.reference, batch)
            reference = token_logprobs(reference_x, self.reference.head, batch.targets, temperature=0.7)
        distance = (logprobs - reference).square().mean()
        value_loss = (self.value_head(x)[..., 0] - (batch.targets % 5) / 5).square().mean()
        loss = value_loss - logprobs.mean() + 0.01 * distance
        return loss, {"value_loss": value_loss.detach(), "distance": distance.detach()}

    def finish_step(self, is_finite: Tensor) -> None:
        self.steps += 1


@dataclass(frozen=True)
class Rollouts:
    """Sampled sequences with a reward per token."""

    ids: Tensor  # (B, T + 1)
    rewards: Tensor  # (B, T)
    count: int

    def to(self, device: torch.device) -> Rollouts:
        return Rollouts(self.ids.to(device), self.rewards.to(device), self.count)


class RolloutTask(Task):
    """REINFORCE on sequences sampled from the current model, rewarded for even tokens."""

    @torch.no_grad()
    def batch(self, n: int, model: Decoder) -> Rollouts:
        ids = torch.full((8, 1), n % model.spec.vocab)
        for _ in range(10):
            ids = torch.cat((ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1)), 1)
        rewards = (ids[:, 1:] % 2 == 0).float()
        return Rollouts(ids, rewards, rewards.numel())

    def loss(self, model: Decoder, batch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = token_logprobs(model.hidden_states(batch.ids[:, :-1]), model.head, batch.ids[:, 1:])
        reward = batch.rewards.mean()
        return -(logprobs * (batch.rewards - reward)).mean(), {"reward": reward}
