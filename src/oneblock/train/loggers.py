"""Metric loggers besides `metrics.jsonl`: TensorBoard event files, trackio, wandb."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from torch import Tensor

from oneblock.errors import missing_extra
from oneblock.train.options import Train, Watch
from oneblock.train.run import settings

FOLDER, PROJECT = "tensorboard", "oneblock"
FLUSH_SECONDS = 10  # events reach the disk within this time
PIXELS = 12  # of an expert in the expert load image

# Metric name -> tag; dashboards group tags by their prefix
TAGS = {
    "loss": "loss/training",
    "val": "loss/validation",
    "val_ema": "loss/validation_ema",
    "lr": "step/learning_rate",
    "speed": "machine/tokens_per_second",
    "mfu": "machine/mfu",
    "memory": "machine/memory_gb",
    **{name: f"step/{name}" for name in ("grad_norm", "tokens", "seconds")},
    **{name: f"experts/{name}" for name in ("load_balancing_loss", "max_load", "min_load")},
}


class MetricLogger(Protocol):
    """A destination of metrics."""

    def add(self, row: dict[str, float]) -> None:
        """Log one row of metrics.jsonl."""

    def load(self, step: int, load: Tensor) -> None:
        """Log expert load: each expert's share of the tokens, (layers, experts)."""

    def text(self, step: int, text: str) -> None:
        """Log a sample."""

    def close(self) -> None: ...


def check_loggers(watch: Watch) -> None:
    """Raise OneblockError if the package of a `--track` logger is not installed."""
    for name in watch.track:
        if find_spec(name) is None:
            raise missing_extra(f"--track {name}", name, name)


def open_loggers(run: Path, options: Train, step: int) -> list[MetricLogger]:
    """The loggers that the options name, continued after `step`."""
    check_loggers(options.watch)
    loggers: list[MetricLogger] = [TensorBoard(run / FOLDER, step)] if options.watch.tensorboard else []
    return [*loggers, *(Tracker(name, run, options) for name in dict.fromkeys(options.watch.track))]


def tag_metrics(row: dict[str, float]) -> Iterable[tuple[str, float]]:
    for key, value in row.items():
        if key != "step":
            yield TAGS.get(key, key), value / 1e9 if key == "memory" else value


class TensorBoard:
    """TensorBoard event files: `tensorboard --logdir runs` shows all runs of a folder."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        # Steps after the last checkpoint are measured again. File names only have the second of their creation: the
        # suffix keeps a run that is resumed within a second from overwriting its first file.
        purge_step, suffix = step + 1 if step else None, f".{os.getpid()}.{token_hex(2)}"
        options: dict[str, Any] = {"purge_step": purge_step, "flush_secs": FLUSH_SECONDS, "filename_suffix": suffix}
        self.writer = SummaryWriter(str(folder), **options)

    def add(self, row: dict[str, float]) -> None:
        for tag, value in tag_metrics(row):
            self.writer.add_scalar(tag, value, int(row["step"]))

    def load(self, step: int, load: Tensor) -> None:
        """An image with a row per layer: grey at an even share of the tokens, white from twice that."""
        grey = (load.float().cpu() * load.shape[1] / 2).clamp(0, 1)
        image = grey.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
        self.writer.add_image("experts/load", image.numpy(), step, dataformats="HW")

    def text(self, step: int, text: str) -> None:
        self.writer.add_text("sample", as_code_block(text), step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """trackio or wandb, which have the same interface."""

    def __init__(self, name: str, run: Path, options: Train):
        self.module: Any = import_module(name)
        extra: dict[str, Any] = {"resume": "allow"}
        if name == "wandb":
            # Offline unless WANDB_MODE says otherwise; `wandb sync` uploads later
            extra |= {"dir": str(run), "mode": os.environ.get("WANDB_MODE", "offline"), "id": run_id(run)}
        self.module.init(project=PROJECT, name=run.resolve().name, config=settings(options), **extra)

    def add(self, row: dict[str, float]) -> None:
        self.module.log(dict(tag_metrics(row)), step=int(row["step"]))

    def load(self, step: int, load: Tensor) -> None:
        for i, layer in enumerate(load.tolist()):
            self.module.log({f"experts/layer{i}/{j}": share for j, share in enumerate(layer)}, step=step)

    def text(self, step: int, text: str) -> None:
        """Samples go to the terminal and to TensorBoard only."""

    def close(self) -> None:
        self.module.finish()


def run_id(run: Path) -> str:
    """An id that stays the same when a run is resumed, and differs for a folder created anew."""
    return f"{zlib.crc32(f'{run.resolve()} {run.stat().st_ino}'.encode()):08x}"


def as_code_block(text: str) -> str:
    """Text as a Markdown code block."""
    return "\n".join("    " + line for line in text.splitlines())
