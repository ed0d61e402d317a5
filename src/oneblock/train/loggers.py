"""Where a run's measurements go beside `metrics.jsonl`: TensorBoard's event files, trackio, wandb."""

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
FLUSH = 10  # seconds after which events are on the disk
ENLARGED = 12  # pixels of an expert in the picture of the load

# Names under which dashboards group what belongs together
TAGS = {
    **{"loss": "loss/training", "val": "loss/validation", "val_ema": "loss/validation_averaged"},
    **{
        "lr": "step/learning_rate",
        "grad_norm": "step/gradient_norm",
        "tokens": "step/tokens",
        "seconds": "step/seconds",
    },
    **{"speed": "machine/tokens_per_second", "mfu": "machine/mfu", "memory": "machine/memory_gb"},
    **{"load_balancing_loss": "experts/balance", "max_load": "experts/max_load", "min_load": "experts/min_load"},
}


class MetricLogger(Protocol):
    def add(self, row: dict[str, float]) -> None:
        """A line of metrics.jsonl."""

    def load(self, step: int, load: Tensor) -> None:
        """The experts' shares of the tokens, (layers, experts)."""

    def text(self, step: int, text: str) -> None:
        """A sample."""

    def close(self) -> None: ...


def check(watch: Watch) -> None:
    """OneblockError where a package that is to be reported to is not installed."""
    for name in watch.track:
        if find_spec(name) is None:
            raise missing_extra(f"--track {name}", name, name)


def sinks(run: Path, options: Train, step: int) -> list[MetricLogger]:
    """Those that were asked for, going on after `step`."""
    check(options.watch)
    found: list[MetricLogger] = [TensorBoard(run / FOLDER, step)] if options.watch.tensorboard else []
    return [*found, *(Tracker(name, run, options) for name in dict.fromkeys(options.watch.track))]


def tagged(row: dict[str, float]) -> Iterable[tuple[str, float]]:
    for key, value in row.items():
        if key != "step":
            yield TAGS.get(key, key), value / 1e9 if key == "memory" else value


class TensorBoard:
    """Event files: `tensorboard --logdir runs` shows all runs of a folder together."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        # What a stopped run wrote after its last checkpoint will be measured again. A file's name holds the second
        # it was made in: without more, one resumed at once would write over the one before
        after, more = step + 1 if step else None, f".{os.getpid()}.{token_hex(2)}"
        self.writer = SummaryWriter(str(folder), purge_step=after, flush_secs=FLUSH, filename_suffix=more)

    def add(self, row: dict[str, float]) -> None:
        for tag, value in tagged(row):
            self.writer.add_scalar(tag, value, int(row["step"]))

    def load(self, step: int, load: Tensor) -> None:
        """A picture with a row for each layer: grey where an expert has its even share, white from twice that."""
        grey = (load.float().cpu() * load.shape[1] / 2).clamp(0, 1)
        large = grey.repeat_interleave(ENLARGED, 0).repeat_interleave(ENLARGED, 1)
        self.writer.add_image("experts/load", large.numpy(), step, dataformats="HW")

    def text(self, step: int, text: str) -> None:
        self.writer.add_text("sample", indented(text), step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """trackio or wandb, which are called alike."""

    def __init__(self, name: str, run: Path, options: Train):
        self.module: Any = import_module(name)
        more: dict[str, Any] = {"resume": "allow"}
        if name == "wandb":
            # Nothing leaves the machine unless somebody said so; `wandb sync` sends it later
            more |= {"dir": str(run), "mode": os.environ.get("WANDB_MODE", "offline"), "id": identity(run)}
        self.module.init(project=PROJECT, name=run.resolve().name, config=settings(options), **more)

    def add(self, row: dict[str, float]) -> None:
        self.module.log(dict(tagged(row)), step=int(row["step"]))

    def load(self, step: int, load: Tensor) -> None:
        for i, layer in enumerate(load.tolist()):
            self.module.log({f"experts/layer{i}/{j}": share for j, share in enumerate(layer)}, step=step)

    def text(self, step: int, text: str) -> None:
        """Samples are in the terminal and in TensorBoard."""

    def close(self) -> None:
        self.module.finish()


def identity(run: Path) -> str:
    """The same for every sitting of a run, and another for a folder that was made anew."""
    return f"{zlib.crc32(f'{run.resolve()} {run.stat().st_ino}'.encode()):08x}"


def indented(text: str) -> str:
    """As Markdown that keeps its lines."""
    return "\n".join("    " + line for line in text.splitlines())
