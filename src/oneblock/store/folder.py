"""Replacing a folder or a file in one step: written beside it, flushed to the disk, then exchanged with it."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from oneblock.errors import OneblockError

STALE = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")  # of the model before


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `folder` once the block is through; before that nothing changes.

    What else was in the old folder (a tokenizer, a README) comes along. OneblockError where the disk is full.
    """
    target = Path(folder).expanduser().resolve()
    _check(target)
    new = target.with_name(f".{target.name}.{os.getpid()}-{token_hex(4)}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        new.mkdir()
        yield new
        if target.exists():
            _carry_over(target, new)
        flush(new)
        exchange(new, target)
        flush_folder(target.parent)
    except OSError as error:
        raise OneblockError(
            f"{folder}: could not be saved ({error.strerror or error}); make room or choose another folder "
            f"(what was there before is unchanged)"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)  # what was half written, or what was there before


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once the block is through; before that nothing changes."""
    new = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}.new")
    try:
        if path.is_dir():
            raise OneblockError(f"{path}: is a folder; name the file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        raise OneblockError(
            f"{path}: could not be written ({error.strerror or error}); make room or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            new.unlink()


def _check(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise OneblockError(f"{target}: is a file; choose a folder to save to")
    if target.is_dir() and not (target / "config.json").exists() and any(p.is_dir() for p in target.iterdir()):
        raise OneblockError(f"{target}: holds folders and is not a model's; choose a new folder to save to")


def _remove_abandoned(target: Path) -> None:
    """What a killed process left half written."""
    for left in target.parent.glob(f".{target.name}.*.new"):
        pid = left.name.removeprefix(f".{target.name}.").partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _carry_over(old: Path, new: Path) -> None:
    for path in old.iterdir():
        if any(path.match(pattern) for pattern in STALE) or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, copy_function=_link, symlinks=True)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    with suppress(OSError, AttributeError):  # not every system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def exchange(new: Path, target: Path) -> None:
    """Put `new` where `target` is, and what was there where `new` was."""
    if not target.exists():
        new.rename(target)
    elif not _exchange_at_once(new, target):
        old = new.with_suffix(".old")
        target.rename(old)
        new.rename(target)
        old.rename(new)


def _exchange_at_once(a: Path, b: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE: at no moment is there no folder."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
