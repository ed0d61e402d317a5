"""Files and folders that are written to a temporary sibling, fsynced, then renamed over their target.

A failure, a full disk or a kill before the rename leaves the old content; readers see the old or the new, never a mix.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex

from oneblock.errors import OneblockError

FIX = "free disk space or choose another path (existing files are unchanged)"


@contextmanager
def report_write_errors(path: str | Path, fix: str = FIX) -> Iterator[None]:
    """Turn an OSError of the block (disk full, no permission) into an OneblockError of one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise OneblockError(f"{path}: could not be written ({error.strerror or error}); {fix}") from error


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; it is renamed to `path` when the block ends without an exception."""
    with _temporary_sibling(path) as (target, temporary):
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "not a regular file"
            raise OneblockError(f"{path}: is {kind}; name the file to write")
        yield temporary
        fsync_file(temporary)
        temporary.replace(target)


def write_files(folder: str | Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files (text as UTF-8) into a folder: all temporary ones are complete before the first is renamed."""
    with ExitStack() as stack:
        for name, content in contents.items():
            temporary = stack.enter_context(replace_file(Path(folder) / name))
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write one file, text as UTF-8."""
    write_files(Path(path).parent, {Path(path).name: content})


@contextmanager
def replace_folder(folder: str | Path, obsolete: Callable[[Path], Collection[str]] | None = None) -> Iterator[Path]:
    """Give an empty temporary folder; it takes the place of `folder` when the block ends without an exception.

    Files of the old folder are carried over (hard links where possible), except those with a new version and those
    that `obsolete(old folder)` names.
    """
    with _temporary_sibling(folder) as (target, temporary):
        if target.exists() and not target.is_dir():
            raise OneblockError(f"{folder}: is a file; choose a folder to save to")
        temporary.mkdir()
        yield temporary
        if target.exists():
            _carry_over(target, temporary, obsolete(target) if obsolete else ())
        fsync_tree(temporary)
        exchange_folders(temporary, target)


def refuse_same_folder(out: str | Path, source: str | Path) -> None:
    """Raise OneblockError if a converter's output is its input; symlinks are resolved."""
    if Path(out).expanduser().resolve() == Path(source).expanduser().resolve():
        raise OneblockError(f"{out}: is the input, which would be overwritten; choose another output path")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, without a byte-order mark; OneblockError where it cannot be read."""
    try:
        content = path.read_bytes()
        if b"\0" in content:
            raise OneblockError(f"{path} is not text (it contains zero bytes): give text files")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise OneblockError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise OneblockError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first") from None


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush the folder's entries, so that a rename in it survives a power cut."""
    with suppress(OSError, AttributeError):  # not every system can open a folder
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folder."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            fsync_file(path)
    fsync_folder(folder)


def exchange_folders(new: Path, target: Path) -> None:
    """Swap two folders; move `new` if there is no `target`."""
    if not target.exists():
        new.rename(target)
    elif not _rename_exchange(new, target):
        old = new.with_suffix(".old")
        target.rename(old)
        new.rename(target)
        old.rename(new)


def _rename_exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE), so that `target` exists at every moment; False if it is not available."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


@contextmanager
def _temporary_sibling(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """`path` with its links resolved, and a temporary path beside it that is deleted at the end.

    The name, `.NAME.HOST-PID-RANDOM.new`, is hidden, on the same file system, and names its process: siblings that
    killed processes of this host have left are deleted first.
    """
    target = Path(path).expanduser().resolve()
    start = f".{target.name}.{platform.node()}-"
    temporary = target.with_name(f"{start}{os.getpid()}-{token_hex(4)}.new")
    with report_write_errors(path):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for abandoned in target.parent.glob(f"{escape(start)}*.new"):
                pid = abandoned.name.removeprefix(start).partition("-")[0]
                if pid.isdigit() and not _is_running(int(pid)):
                    _delete(abandoned)
            yield target, temporary
            fsync_folder(target.parent)
        finally:
            _delete(temporary)  # the unfinished file or folder, or the old folder after the exchange


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


def _carry_over(old: Path, new: Path, obsolete: Collection[str]) -> None:
    for path in old.iterdir():
        if path.name in obsolete or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, copy_function=_link_or_copy, symlinks=True)
        else:
            _link_or_copy(path, new / path.name)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
