"""A training state as a folder: a Hugging Face model and its tokenizer, and beside them what resuming needs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.store import load_model, replacing
from oneblock.store.save import write_model
from oneblock.text import Tokenizer
from oneblock.train.loop import State

OPTIMIZER, PROGRESS, LATEST = "optimizer.safetensors", "training.json", "latest"


@dataclass(frozen=True)
class Progress:
    """`training.json`: where the run stands."""

    step: int
    tokens: int
    seconds: float
    data: str  # fingerprint of the training ids


def save(run: Path, state: State, tokenizer: Tokenizer, data: str, keep: int) -> Path:
    """Save into `run/step-N` and point `run/latest` to it. Until the last moment `latest` is the one before.

    OneblockError where the disk is full: what was saved before is unchanged.
    """
    folder = run / f"step-{state.step:06d}"
    with replacing(folder) as new:
        write_model(new, state.model)
        tokenizer.save(new)
        save_tensors(moments(state), new / OPTIMIZER)
        progress = Progress(state.step, state.tokens, state.seconds, data)
        (new / PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")
    point(run / LATEST, folder.name)
    for old in sorted(run.glob("step-[0-9]*"), key=lambda path: int(path.name[5:]))[: -max(keep, 1)]:
        if old != folder:
            shutil.rmtree(old)
    return folder


def point(link: Path, target: str) -> None:
    """Make `link` name `target` in one step."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)
    descriptor = os.open(link.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def moments(state: State) -> dict[str, Tensor]:
    """The optimizer's tensors under the names of their parameters: `exp_avg.blocks.0.attn.wq.weight`."""
    found = {}
    for name, p in state.model.named_parameters():
        for key, value in state.optimizer.state_of(p).items():
            found[f"{key}.{name}"] = value.contiguous()
    return found


def latest(run: Path) -> Path:
    """The checkpoint to go on from."""
    if not run.is_dir():
        raise OneblockError(f"{run}: no such run; --resume takes the folder of one")
    folder = (run / LATEST).resolve()
    if not (run / LATEST).exists() or not (folder / PROGRESS).exists():
        raise OneblockError(f"{run} has no checkpoint to resume from (no {LATEST}/{PROGRESS})")
    return folder


def progress(folder: Path) -> Progress:
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise OneblockError(f"{folder / PROGRESS} cannot be read ({e}): the checkpoint is damaged") from None


@torch.no_grad()
def restore(folder: Path, state: State) -> Progress:
    """Fill the state from a checkpoint, to the last bit."""
    weights = load_model(folder, dtype=torch.float32).model.state_dict()
    # Copied rather than taken: pages of a file lie elsewhere in memory, and sums may round differently there
    state.model.load_state_dict(weights)
    found = load_tensors(folder / OPTIMIZER)
    for name, p in state.model.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in found]
        if len(keys) != 3:
            raise OneblockError(f"{folder / OPTIMIZER} has nothing on {name}: it belongs to another model")
        state.optimizer.parts[0].state[p] = {key: found[f"{key}.{name}"].to(p.device).clone() for key in keys}
    at = progress(folder)
    state.step, state.tokens, state.seconds = at.step, at.tokens, at.seconds
    return at


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as e:  # what it makes of a full disk
        raise OSError(str(e)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise OneblockError(f"{path} cannot be read ({e}): the checkpoint is damaged") from None
