"""`manifest.json`: the size and the SHA-256 of every file of a folder, and of the manifest itself."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from oneblock.errors import OneblockError
from oneblock.files import write_file

MANIFEST = "manifest.json"
FORMAT = 1

Checksums = dict[str, dict[str, int | str]]  # file -> bytes, sha256


def hash_files(folder: Path, names: list[str]) -> Checksums:
    """Size and SHA-256 of files, in parallel: hashing releases the GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True))


def hash_file(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _render(files: Checksums, about: dict[str, Any]) -> str:
    """The manifest's text; its last entry is the SHA-256 of the others, so that any changed byte is detected."""
    body = {"format": FORMAT, **about, "files": dict(sorted(files.items()))}
    return json.dumps({**body, "sha256": hashlib.sha256(_dump(body)).hexdigest()}, indent=1) + "\n"


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode()


def write(folder: Path, files: Checksums, **about: Any) -> None:
    """Write a folder's manifest; `about` are further entries."""
    write_file(folder / MANIFEST, _render(files, about))


def read(folder: Path) -> dict[str, Any]:
    """The entries of a manifest; `files` are the checksums. OneblockError if it is missing or was changed."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        body = json.loads(text)
        about = {key: value for key, value in body.items() if key not in ("format", "files", "sha256")}
        if _render(body["files"], about) != text:
            raise ValueError("its own checksum does not match")
    except FileNotFoundError:
        raise OneblockError(f"{path} is missing: the folder is incomplete") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise OneblockError(f"{path} is damaged ({str(e).splitlines()[0] if str(e) else type(e).__name__})") from None
    return body


def verify(folder: Path) -> None:
    """Verify the checksums of a folder. OneblockError names the first file that differs."""
    files: Checksums = read(folder)["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise OneblockError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise OneblockError(f"{path} is damaged: it has {size:,} bytes instead of {entry['bytes']:,}")
    actual = hash_files(folder, list(files))
    for name, entry in files.items():
        if actual[name]["sha256"] != entry["sha256"]:
            raise OneblockError(f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}")
