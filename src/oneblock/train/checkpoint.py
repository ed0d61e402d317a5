"""A training state as a folder: a Hugging Face model with its tokenizer, and what resuming needs.

model.safetensors ..      weights, under Hugging Face names
optimizer.safetensors ..  `exp_avg.blocks.0.attn.wq.weight` and so on; `ema.NAME` for the moving average
task.safetensors          what the task trains beside the model, such as a value head
training.json             step, tokens, seconds, fingerprint of the data
manifest.json             sizes and sha256 of all files, written last

Ranks gather every full tensor in turn, and each writes a share of them: a checkpoint does not depend on the number of
ranks. A folder is written to a temporary one, fsynced and renamed, then `latest` moves. Older checkpoints are deleted
once the new one is verified.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from oneblock.errors import OneblockError
from oneblock.files import exchange_folders, fsync_folder, fsync_tree, report_write_errors
from oneblock.parallel.pipeline import RemoteParameter
from oneblock.store import load_model, manifest
from oneblock.store.manifest import verify
from oneblock.store.save import plan_weight_files, write_config_files, write_tensors, write_weights
from oneblock.text import Tokenizer
from oneblock.train.loop import State

PROGRESS, LATEST, TASK = "training.json", "latest", "task.safetensors"
SAVE_TIMEOUT = 20.0  # seconds that a background save may take after a failure; a run that lost a rank ends within 60


@dataclass(frozen=True)
class Progress:
    """`training.json`. No random state is stored: what is random in step n follows from the run's seed and n."""

    step: int
    tokens: int
    seconds: float
    data: str  # fingerprint of the training ids


# ------------------------------------------------------------------ saving


class Saver:
    """Saves states of a run, synchronously or in the background from a copy in CPU memory."""

    def __init__(self, run: Path, tokenizer: Tokenizer, data: str, keep: int, background: bool = False):
        """Collective: several ranks get a process group of their own, to agree on what was written."""
        self.run, self.tokenizer, self.data, self.keep, self.background = run, tokenizer, data, keep, background
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.group = dist.new_group(backend="gloo") if self.ranks > 1 else None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, state: State) -> Path:
        """Save into `run/step-N`, then point `run/latest` to it.

        OneblockError where the disk is full, also for an earlier background save; older checkpoints stay as they are.
        """
        self.wait()
        share = Share(state, self.rank, self.ranks, copy=self.background)
        progress = Progress(state.step, state.tokens, state.seconds, self.data)
        if self.background:
            self.thread = threading.Thread(target=self._write_in_background, args=(share, progress))
            self.thread.start()
        else:
            self._write(share, progress)
        return self.run / folder_name(progress.step)

    def wait(self) -> None:
        """Wait for the background save and raise its error, if any."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait_briefly(self) -> None:
        """After a failure: give the background save SAVE_TIMEOUT seconds to end."""
        if self.thread is not None:
            self.thread.join(SAVE_TIMEOUT)

    def _write_in_background(self, share: Share, progress: Progress) -> None:
        try:
            self._write(share, progress)
        except Exception as e:
            self.error = e

    def _write(self, share: Share, progress: Progress) -> None:
        folder = self.run / folder_name(progress.step)
        new = self.run / f".{folder.name}.new"
        try:
            with report_write_errors(folder):
                self._on_all_ranks(lambda: self._empty(new) if self.rank == 0 else None)
                self._on_all_ranks(lambda: self._write_share(new, share, progress))
                self._on_all_ranks(lambda: self._finish(new, folder) if self.rank == 0 else None)
        finally:
            if self.rank == 0:
                shutil.rmtree(new, ignore_errors=True)

    def _on_all_ranks(self, part: Callable[[], None]) -> None:
        """Run this rank's part and wait for the others; if one fails, all raise."""
        error: OSError | None = None
        try:
            part()
        except OSError as e:
            error = e
        failed = torch.tensor(float(error is not None))
        if self.group is not None:
            dist.all_reduce(failed, group=self.group)
        if error is not None:
            raise error
        if failed:
            raise OSError("another rank could not write its share")

    def _empty(self, new: Path) -> None:
        for partial in self.run.glob(".step-*.new"):  # left by a killed run
            shutil.rmtree(partial, ignore_errors=True)
        new.mkdir(parents=True)

    def _write_share(self, new: Path, share: Share, progress: Progress) -> None:
        names = share.write(new)
        if self.rank == 0:
            self.tokenizer.save(new)
            (new / PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")
            names += [path.name for path in new.iterdir() if not is_written_by_ranks(path) and path.name not in names]
        sums = manifest.hash_files(new, sorted(names))
        (new / f"{self.rank}.sums").write_text(json.dumps(sums))

    def _finish(self, new: Path, folder: Path) -> None:
        """On rank 0: write the manifest, rename the folder, move `latest` and delete older checkpoints."""
        sums: manifest.Checksums = {}
        for path in new.glob("*.sums"):
            sums |= json.loads(path.read_text())
            path.unlink()
        manifest.write(new, sums)
        fsync_tree(new)
        exchange_folders(new, folder)
        fsync_folder(self.run)
        verify(folder)
        point_link(self.run / LATEST, folder.name)
        for old in [path for path in list_checkpoints(self.run) if path != folder][self.keep - 1 :]:
            shutil.rmtree(old, ignore_errors=True)


def is_written_by_ranks(path: Path) -> bool:
    """Whether each rank lists such files itself; hidden ones are temporary."""
    return path.suffix in (".safetensors", ".sums") or path.name.startswith(".")


class Share:
    """The full tensors that one rank writes, about as many bytes on each. Building it is collective."""

    def __init__(self, state: State, rank: int, ranks: int, copy: bool):
        self.model, self.is_main = state.model, rank == 0
        self.files = plan_weight_files(state.model, ranks)
        self.own_files = {name: slots for i, (name, slots) in enumerate(self.files.items()) if i % ranks == rank}
        own = {part.name for slots in self.own_files.values() for slot in slots.values() for part in slot.parts}
        self.weights: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}
        self.optimizer_file = (
            f"optimizer-{rank + 1:05}-of-{ranks:05}.safetensors" if ranks > 1 else "optimizer.safetensors"
        )
        for i, (name, p) in enumerate(state.named_parameters()):
            weight, writer = full_tensor(p, copy), getattr(p, "owner_rank", i % ranks)
            if name in own:
                self.weights[name] = weight
            for key, x in optimizer_tensors(state, name, p):
                x = full_tensor(x, copy)
                if writer == rank:
                    self.optimizer[f"{key}.{name}"] = x.contiguous()
        task = {name: full_tensor(x, copy).contiguous() for name, x in state.task.trained_state().items()}
        self.task = task if self.is_main else {}

    def write(self, folder: Path) -> list[str]:
        """Write the files and return their names."""
        for name, slots in self.own_files.items():
            write_weights(folder / name, slots, self.weights)
        if self.is_main:
            write_config_files(folder, self.model, self.files)
        write_tensors(folder / self.optimizer_file, self.optimizer)
        if self.task:
            write_tensors(folder / TASK, self.task)
        return [*self.own_files, self.optimizer_file, *([TASK] if self.task else [])]


def full_tensor(x: Tensor, copy: bool) -> Tensor:
    """The tensor with all its shards, on the CPU; `copy`: in memory that training does not write to.

    Collective for shards and for the parameters of pipeline stages.
    """
    full = (x.full_tensor() if isinstance(x, DTensor) else x).detach()
    if hasattr(x, "owner_rank"):
        full = torch.empty_like(full, memory_format=torch.contiguous_format).copy_(full)
        dist.broadcast(full, x.owner_rank)  # type: ignore[attr-defined]
        return full.cpu()
    on_cpu = full.cpu()
    return on_cpu.clone() if copy and on_cpu.data_ptr() == x.data_ptr() else on_cpu


def optimizer_tensors(state: State, name: str, p: torch.nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Optimizer state and moving average of one parameter: `exp_avg`, `exp_avg.codes` (8-bit moments), `ema`."""
    for key, value in sorted(state.optimizer.state_of(p).items()):
        if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
            for part in value.__tensor_flatten__()[0]:
                yield f"{key}.{part}", getattr(value, part)
        elif isinstance(value, Tensor):
            yield key, value
    if state.ema is not None and name in state.ema:
        yield "ema", state.ema[name]


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    folders = [path for path in run.glob("step-[0-9]*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def point_link(link: Path, target: str) -> None:
    """Point a symbolic link to `target`, atomically."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)
    fsync_folder(link.parent)


# ------------------------------------------------------------------ restoring


def newest(run: Path, warn: Callable[[str], None] = lambda line: None) -> Path:
    """The newest checkpoint that its checksums verify; `warn` gets a line for each damaged one that is newer."""
    if not run.is_dir():
        raise OneblockError(f"{run}: no such run; --resume takes the folder of one")
    damaged = []
    for folder in list_checkpoints(run):
        try:
            verify(folder)
        except OneblockError as e:
            damaged.append(str(e))
            continue
        for line in damaged:
            warn(f"{line}; resuming from {folder.name}")
        return folder
    if damaged:
        raise OneblockError(f"{run} has no undamaged checkpoint to resume from: {'; '.join(damaged)}")
    raise OneblockError(f"{run} has no checkpoint to resume from")


def read_progress(folder: Path) -> Progress:
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise OneblockError(f"{folder / PROGRESS} cannot be read ({e}): the checkpoint is damaged") from None


@torch.no_grad()
def restore(folder: Path, state: State) -> Progress:
    """Fill the state from a verified checkpoint, bit for bit; each rank takes its shards."""
    progress, optimizer = read_progress(folder), StoredTensors(folder, "optimizer*.safetensors")
    create_optimizer_state(state, [key for key in optimizer.files if not key.startswith("ema.")])
    weights = dict(load_model(folder, dtype=torch.float32).model.named_parameters())
    for name, p in state.named_parameters():
        if isinstance(p, RemoteParameter):
            continue
        if name in weights:  # copied: mapped pages of a file are aligned otherwise, and sums may round otherwise
            copy_shard(p, weights[name].detach())
        for key, x in optimizer_tensors(state, name, p):
            copy_shard(x, optimizer.read(f"{key}.{name}"))
    if tensors := state.task.trained_state():
        stored = StoredTensors(folder, TASK)
        for name, x in tensors.items():
            copy_shard(x, stored.read(name))
    state.step, state.tokens, state.seconds = progress.step, progress.tokens, progress.seconds
    return progress


def create_optimizer_state(state: State, stored: Iterable[str]) -> None:
    """Let the optimizer allocate the stored moments, by a step of zero gradients at learning rate 0.

    Parameters without a gradient so far, such as those of cross-attention without images, have no moments.
    """
    named = dict(state.named_parameters())
    for key in stored:  # `exp_avg.NAME`, `exp_avg.codes.NAME`
        parts = key.split(".")
        name = next((name for i in range(1, len(parts)) if (name := ".".join(parts[i:])) in named), None)
        if name is not None and named[name].requires_grad:
            named[name].grad = torch.zeros_like(named[name])
    state.optimizer.set_lr(0.0)
    state.optimizer.step(torch.ones((), dtype=torch.bool))
    state.optimizer.zero_grad()


def copy_shard(x: Tensor, full: Tensor) -> None:
    """Copy a full tensor into one that may be a shard of it."""
    if isinstance(x, DTensor):
        full = distribute_tensor(full.to(x.device), x.device_mesh, x.placements, src_data_rank=None).to_local()
        x = x.to_local()
    x.copy_(full)


class StoredTensors:
    """The tensors of a checkpoint's files that match a pattern, read one at a time."""

    def __init__(self, folder: Path, pattern: str):
        self.folder, self.files = folder, {}
        for path in sorted(folder.glob(pattern)):
            file: Any = self._open(path)
            self.files |= dict.fromkeys(file.keys(), file)

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as e:
            raise OneblockError(f"{path} cannot be read ({e}): the checkpoint is damaged") from None

    def read(self, name: str) -> Tensor:
        if name not in self.files:
            raise OneblockError(f"{self.folder} has no {name}: it was saved with another model, optimizer or task")
        return self.files[name].get_tensor(name)
