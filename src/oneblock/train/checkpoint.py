"""A training state as a folder: a Hugging Face model and its tokenizer, and beside them what resuming needs.

model.safetensors ..      the weights, under the names that everybody's loaders know
optimizer.safetensors ..  `exp_avg.blocks.0.attn.wq.weight` and so on; `ema.NAME` where an average is kept
training.json             where the run stands
manifest.json             sizes and sha256 of all these, written last

Of R ranks each gathers every tensor in turn and writes its share of them, whole: any number of ranks can read them.
A folder is written beside its place, flushed, renamed; then `latest` moves. What was there before is deleted when the
new one has been read back and found right.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
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

PROGRESS, LATEST = "training.json", "latest"
LINGER = 20.0  # seconds: a run that lost a rank is to end within 60


@dataclass(frozen=True)
class Progress:
    """`training.json`: where the run stands. What is random in step n follows from the run's seed and n alone."""

    step: int
    tokens: int
    seconds: float
    data: str  # fingerprint of the training ids


# ------------------------------------------------------------------ saving


class Saver:
    """Saves a run's states: at once, or in the background from a copy in the CPU's memory."""

    def __init__(self, run: Path, tokenizer: Tokenizer, data: str, keep: int, background: bool = False):
        """Collective where there are several ranks: they get a group of their own to agree on what was written."""
        self.run, self.tokenizer, self.data, self.keep, self.background = run, tokenizer, data, keep, background
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.group = dist.new_group(backend="gloo") if self.ranks > 1 else None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, state: State) -> Path:
        """Save into `run/step-N` and point `run/latest` to it. Until the last moment `latest` is the one before.

        OneblockError where the disk is full, of this save or of the one before in the background: what was saved
        before is unchanged.
        """
        self.wait()
        share = Share(state, self.rank, self.ranks, copy=self.background)
        progress = Progress(state.step, state.tokens, state.seconds, self.data)
        if self.background:
            self.thread = threading.Thread(target=self._guarded, args=(share, progress))
            self.thread.start()
        else:
            self._write(share, progress)
        return self.run / name_of(progress.step)

    def wait(self) -> None:
        """Until the save in the background is done; its error, if it had one, is raised here."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def linger(self) -> None:
        """After a failure: let a save under way end, if it does within LINGER seconds."""
        if self.thread is not None:
            self.thread.join(LINGER)

    def _guarded(self, share: Share, progress: Progress) -> None:
        try:
            self._write(share, progress)
        except Exception as e:
            self.error = e

    def _write(self, share: Share, progress: Progress) -> None:
        folder = self.run / name_of(progress.step)
        new = self.run / f".{folder.name}.new"
        try:
            with report_write_errors(folder):
                self._together(lambda: self._empty(new) if self.rank == 0 else None)
                self._together(lambda: self._write_share(new, share, progress))
                self._together(lambda: self._finish(new, folder) if self.rank == 0 else None)
        finally:
            if self.rank == 0:
                shutil.rmtree(new, ignore_errors=True)

    def _together(self, part: Callable[[], None]) -> None:
        """Do a part and wait for the others; where one fails, all do."""
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
        for left in self.run.glob(".step-*.new"):  # what a killed run left half written
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)

    def _write_share(self, new: Path, share: Share, progress: Progress) -> None:
        mine = share.write(new)
        if self.rank == 0:
            self.tokenizer.save(new)
            (new / PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")
            mine += [path.name for path in new.iterdir() if not is_shared(path) and path.name not in mine]
        sums = manifest.hash_files(new, sorted(mine))
        (new / f"{self.rank}.sums").write_text(json.dumps(sums))

    def _finish(self, new: Path, folder: Path) -> None:
        """Rank 0, when all have written: the manifest, the folder in its place, `latest`, and what may go."""
        sums: manifest.Checksums = {}
        for path in new.glob("*.sums"):
            sums |= json.loads(path.read_text())
            path.unlink()
        manifest.write(new, sums)
        fsync_tree(new)
        exchange_folders(new, folder)
        fsync_folder(self.run)
        verify(folder)
        point(self.run / LATEST, folder.name)
        for old in [path for path in saved(self.run) if path != folder][self.keep - 1 :]:
            shutil.rmtree(old, ignore_errors=True)


def is_shared(path: Path) -> bool:
    """Whether several ranks write such files; hidden ones are what safetensors writes aside and renames."""
    return path.suffix in (".safetensors", ".sums") or path.name.startswith(".")


class Share:
    """What one rank writes: whole tensors, about an equal number of bytes each. Making one is collective."""

    def __init__(self, state: State, rank: int, ranks: int, copy: bool):
        self.model, self.first = state.model, rank == 0
        self.files = plan_weight_files(state.model, ranks)
        self.mine = {name: slots for i, (name, slots) in enumerate(self.files.items()) if i % ranks == rank}
        wanted = {part.name for slots in self.mine.values() for slot in slots.values() for part in slot.parts}
        self.weights: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}
        self.optimizer_file = (
            f"optimizer-{rank + 1:05}-of-{ranks:05}.safetensors" if ranks > 1 else "optimizer.safetensors"
        )
        for i, (name, p) in enumerate(state.model.named_parameters()):
            weight, writer = whole(p, copy), getattr(p, "owner_rank", i % ranks)
            if name in wanted:
                self.weights[name] = weight
            for key, x in moments(state, name, p):
                x = whole(x, copy)
                if writer == rank:
                    self.optimizer[f"{key}.{name}"] = x.contiguous()

    def write(self, folder: Path) -> list[str]:
        """Names of the files written."""
        for name, slots in self.mine.items():
            write_weights(folder / name, slots, self.weights)
        if self.first:
            write_config_files(folder, self.model, self.files)
        write_tensors(folder / self.optimizer_file, self.optimizer)
        return [*self.mine, self.optimizer_file]


def whole(x: Tensor, copy: bool) -> Tensor:
    """The tensor on the CPU with all of its shards; a copy that nobody writes to, where that is asked for.

    Collective for shards, and for a pipeline's parameters.
    """
    full = (x.full_tensor() if isinstance(x, DTensor) else x).detach()
    if hasattr(x, "owner_rank"):
        full = torch.empty_like(full, memory_format=torch.contiguous_format).copy_(full)
        dist.broadcast(full, x.owner_rank)  # type: ignore[attr-defined]
        return full.cpu()
    here = full.cpu()
    return here.clone() if copy and here.data_ptr() == x.data_ptr() else here


def moments(state: State, name: str, p: torch.nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """What is kept of one parameter beside its value: `exp_avg`, `exp_avg.codes` of one in 8 bits, `ema`."""
    for key, value in sorted(state.optimizer.state_of(p).items()):
        if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
            for part in value.__tensor_flatten__()[0]:
                yield f"{key}.{part}", getattr(value, part)
        elif isinstance(value, Tensor):
            yield key, value
    if state.ema is not None and name in state.ema:
        yield "ema", state.ema[name]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [path for path in run.glob("step-[0-9]*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def point(link: Path, target: str) -> None:
    """Make `link` name `target` in one step."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)
    fsync_folder(link.parent)


# ------------------------------------------------------------------ going on


def newest(run: Path, warn: Callable[[str], None] = lambda line: None) -> Path:
    """The newest checkpoint that is as it was saved. Each damaged one before it is told with the file that is bad."""
    if not run.is_dir():
        raise OneblockError(f"{run}: no such run; --resume takes the folder of one")
    bad = []
    for folder in saved(run):
        try:
            verify(folder)
        except OneblockError as e:
            bad.append(str(e))
            continue
        for line in bad:
            warn(f"{line}; going on from {folder.name}")
        return folder
    if bad:
        raise OneblockError(f"{run} has no whole checkpoint to resume from: {'; '.join(bad)}")
    raise OneblockError(f"{run} has no checkpoint to resume from")


def progress(folder: Path) -> Progress:
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise OneblockError(f"{folder / PROGRESS} cannot be read ({e}): the checkpoint is damaged") from None


@torch.no_grad()
def restore(folder: Path, state: State) -> Progress:
    """Fill the state from a verified checkpoint, to the last bit; each rank takes its part."""
    at, stored = progress(folder), Stored(folder)
    prime(state, [key for key in stored.where if not key.startswith("ema.")])
    weights = dict(load_model(folder, dtype=torch.float32).model.named_parameters())
    for name, p in state.model.named_parameters():
        if isinstance(p, RemoteParameter):
            continue
        # Copied rather than taken: pages of a file lie elsewhere in memory, and sums may round differently there
        fill(p, weights[name].detach())
        for key, x in moments(state, name, p):
            fill(x, stored.get(f"{key}.{name}"))
    state.step, state.tokens, state.seconds = at.step, at.tokens, at.seconds
    return at


def prime(state: State, stored: Sequence[str]) -> None:
    """Make the optimizer allocate the stored moments: a step of zero gradients at a learning rate of zero.

    Parameters without a gradient so far, such as those of cross-attention without images, have none.
    """
    for name, p in state.model.named_parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad and any(key.endswith(f".{name}") for key in stored) else None
    state.optimizer.set_rate(0.0)
    state.optimizer.step(torch.ones((), dtype=torch.bool))
    state.optimizer.zero_grad()


def fill(x: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be a shard of it."""
    if isinstance(x, DTensor):
        value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None).to_local()
        x = x.to_local()
    x.copy_(value)


class Stored:
    """The tensors of all optimizer files, read one at a time."""

    def __init__(self, folder: Path):
        self.folder, self.where = folder, {}
        for path in sorted(folder.glob("optimizer*.safetensors")):
            file: Any = self._open(path)
            self.where |= dict.fromkeys(file.keys(), file)

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as e:
            raise OneblockError(f"{path} cannot be read ({e}): the checkpoint is damaged") from None

    def get(self, name: str) -> Tensor:
        if name not in self.where:
            raise OneblockError(f"{self.folder} has no {name}: it was saved with another model or optimizer")
        return self.where[name].get_tensor(name)
