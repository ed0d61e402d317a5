"""Steps whose loss or gradient was no number: they are written down, and the run stops or goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oneblock.train.loop import Metrics

FILE = "nonfinite.jsonl"
MOST = 20  # bad steps in a row after which there is no hope


class Guard:
    """Keeps every step's verdict on the device until somebody looks."""

    def __init__(self, run: Path):
        self.path = run / FILE
        self.waiting: list[Metrics] = []
        self.streak: list[Metrics] = []  # the newest steps, as far as all of them were bad

    def add(self, metrics: Metrics) -> None:
        self.waiting.append(replace(metrics, aux_metrics={}))

    def look(self) -> list[Metrics]:
        """The bad steps since the last look. On a GPU this waits for it."""
        if not self.waiting:
            return []
        steps, self.waiting = self.waiting, []
        verdicts = torch.stack([m.is_finite for m in steps]).tolist()
        for metrics, good in zip(steps, verdicts, strict=True):
            self.streak = [] if good else [*self.streak, metrics]
        return [metrics for metrics, good in zip(steps, verdicts, strict=True) if not good]

    def write(self, bad: list[Metrics]) -> None:
        """A line for each: the step, its batches, its loss and norm."""
        with self.path.open("a", encoding="utf-8") as file:
            for m in bad:
                row = {
                    "step": m.step,
                    "batches": list(m.batches),
                    "loss": exact(m.loss),
                    "grad_norm": exact(m.grad_norm),
                }
                file.write(json.dumps(row) + "\n")


def exact(x: torch.Tensor) -> Any:
    """A number, or the name of what is none: JSON has no NaN."""
    value = float(x)
    return value if math.isfinite(value) else str(value)


def told(m: Metrics) -> str:
    """`step 8: the loss is nan and the gradient's norm inf, in batches 14 and 15`."""
    numbers = [f"{n:,}" for n in m.batches]
    which = f"batch {numbers[0]}" if len(numbers) == 1 else f"batches {numbers[0]} to {numbers[-1]}"
    return f"step {m.step:,}: the loss is {exact(m.loss)} and the gradient's norm {exact(m.grad_norm)}, in {which}"
