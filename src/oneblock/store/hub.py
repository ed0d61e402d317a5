"""A model argument to a file or folder. One rule for every command:

1. a bare name of a published model or family (`gpt2`, `llama-3-8b`) is that architecture, never a local folder;
2. anything else is a local path if it exists (`./gpt2`, `runs/a`, `~/model`, `model`);
3. then `org/name` or `org/name@revision` is downloaded from the hub into its cache.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from oneblock.errors import OneblockError
from oneblock.spec import FAMILIES, MODELS

# Safetensors and text, never pickles or code. Subfolders hold other formats of the same model.
ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe"]
IGNORED = ["*/*", "consolidated*"]
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def is_published(name: str | Path) -> bool:
    """Whether an argument is the bare name of a published model or of a family."""
    return isinstance(name, str) and (name.lower() in MODELS or name.lower().replace("-", "_") in FAMILIES)


def resolve(path_or_name: str | Path) -> Path:
    """The folder (or file) of a model's weights, downloaded if it is `org/name` or `org/name@revision`.

    Downloads honour HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. OneblockError if there is none.
    """
    if is_published(path_or_name):
        fix = f"./{path_or_name} for the local folder" if Path(path_or_name).exists() else "a model folder"
        raise OneblockError(
            f"{path_or_name} is a published architecture, which has no weights here; give {fix}, or an org/name on "
            f"the hub"
        )
    path, name = _find(path_or_name)
    if path is not None:
        return path
    if name is None:
        raise OneblockError(f"{path_or_name}: no such folder; give a model folder, or an org/name on the hub")
    return _download(*name, ALLOWED)


def resolve_architecture(name_or_path: str) -> Path | None:
    """The config.json, or its folder, of an architecture; None for a published or an unknown bare name.

    Only config.json is downloaded from the hub. A published name that is also a local folder is noted on stderr.
    """
    if is_published(name_or_path):
        if Path(name_or_path).exists():
            note = f"{name_or_path}: taking the published model; give ./{name_or_path} for the local folder"
            print(note, file=sys.stderr)
        return None
    path, name = _find(name_or_path)
    if path is None and name is None and ("/" in name_or_path or name_or_path.endswith(".json")):
        raise OneblockError(f"{name_or_path}: no such file or folder; give a config.json, its folder, or a model name")
    return path or (_download(*name, ["config.json"]) / "config.json" if name else None)


def _find(path_or_name: str | Path) -> tuple[Path | None, tuple[str, str | None] | None]:
    """A local path that exists, or else the repository and revision of a hub name."""
    path = Path(path_or_name).expanduser()
    if path.exists():
        return path, None
    name = None if isinstance(path_or_name, Path) else NAME.fullmatch(path_or_name)
    return None, (name["repo"], name["revision"]) if name else None


def _download(repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download  # slow to import, and only needed here

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=IGNORED)
    except errors.GatedRepoError as error:
        raise OneblockError(f"{name}: is gated; accept its licence on its page, and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise OneblockError(f"{name}: the revision does not exist; give a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise OneblockError(
            f"{name}: no such local folder, and no such model on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise OneblockError(
            f"{name}: no such local folder, not in the cache, and the hub cannot be reached; check the name, the "
            f"connection and HF_HUB_OFFLINE"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise OneblockError(f"{name}: could not be downloaded ({reason}); try again") from error
    return Path(folder)
