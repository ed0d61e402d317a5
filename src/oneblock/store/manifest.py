"""`manifest.json`: the size and the sha256 of every file of a folder, and of itself."""

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

Sums = dict[str, dict[str, int | str]]  # file -> bytes and sha256


def sums_of(folder: Path, names: list[str]) -> Sums:
    """Files are read in threads: hashing lets go of Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sum_of(folder / name), names), strict=True))


def sum_of(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": found}


def text_of(files: Sums, about: dict[str, Any]) -> str:
    """The manifest's text, whose last entry is the sha256 of what it would be without: any changed byte shows."""
    body = {"format": FORMAT, **about, "files": dict(sorted(files.items()))}
    return json.dumps({**body, "sha256": hashlib.sha256(_dump(body)).hexdigest()}, indent=1) + "\n"


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode()


def write(folder: Path, files: Sums, **about: Any) -> None:
    """`about`: what else it says of the folder."""
    write_file(folder / MANIFEST, text_of(files, about))


def read(folder: Path) -> dict[str, Any]:
    """All it says; `files` has the sums. OneblockError where it is missing or was changed."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        body = json.loads(text)
        about = {key: value for key, value in body.items() if key not in ("format", "files", "sha256")}
        if text_of(body["files"], about) != text:
            raise ValueError("its own checksum does not fit")
    except FileNotFoundError:
        raise OneblockError(f"{path} is missing: the folder was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise OneblockError(f"{path} is damaged ({str(e).splitlines()[0] if str(e) else type(e).__name__})") from None
    return body


def verify(folder: Path) -> None:
    """Compare every file with the manifest. OneblockError names the first that differs, and how."""
    files: Sums = read(folder)["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise OneblockError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise OneblockError(
                f"{path} is damaged: it has {size:,} bytes, and had {entry['bytes']:,} when it was saved"
            )
    found = sums_of(folder, list(files))
    for name, entry in files.items():
        if found[name]["sha256"] != entry["sha256"]:
            raise OneblockError(f"{folder / name} is damaged: its sha256 is not the one it was saved with")
