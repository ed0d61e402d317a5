"""Steps with a NaN or Inf loss or gradient: they are recorded, and the run stops or skips them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from oneblock.train.loop import Metrics

FILE = "nonfinite.jsonl"
MAX_NONFINITE_STEPS = 20  # consecutive steps after which the run stops in any case


class NonfiniteLog:
    """Collects the results of steps and reads `is_finite` later, since on a GPU reading waits for the device."""

    def __init__(self, run: Path):
        self.path = run / FILE
        self.unread: list[Metrics] = []
        self.streak: list[Metrics] = []  # the newest steps, as long as all of them are NaN or Inf

    def add(self, metrics: Metrics) -> None:
        self.unread.append(replace(metrics, aux_metrics={}))

    def take(self) -> list[Metrics]:
        """The NaN or Inf steps since the last call. On a GPU this waits for the device."""
        if not self.unread:
            return []
        steps, self.unread = self.unread, []
        finite = torch.stack([metrics.is_finite for metrics in steps]).tolist()
        for metrics, is_finite in zip(steps, finite, strict=True):
            self.streak = [] if is_finite else [*self.streak, metrics]
        return [metrics for metrics, is_finite in zip(steps, finite, strict=True) if not is_finite]

    def write(self, steps: list[Metrics]) -> None:
        """Append a line per step: its number, micro-batches, loss and gradient norm."""
        with self.path.open("a", encoding="utf-8") as file:
            for m in steps:
                numbers = {"loss": json_number(m.loss), "grad_norm": json_number(m.grad_norm)}
                file.write(json.dumps({"step": m.step, "batches": list(m.batches), **numbers}) + "\n")


def json_number(x: torch.Tensor) -> float | str:
    """A number, or "nan", "inf" or "-inf", which JSON lacks."""
    value = float(x)
    return value if math.isfinite(value) else str(value)


def describe_step(m: Metrics) -> str:
    """`NaN or Inf in step 8: loss nan, gradient norm inf, batches 14 to 15`."""
    numbers = [f"{n:,}" for n in m.batches]
    batches = f"batch {numbers[0]}" if len(numbers) == 1 else f"batches {numbers[0]} to {numbers[-1]}"
    loss, norm = json_number(m.loss), json_number(m.grad_norm)
    return f"NaN or Inf in step {m.step:,}: loss {loss}, gradient norm {norm}, {batches}"
