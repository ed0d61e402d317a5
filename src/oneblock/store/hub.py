"""A local path or a hub name to a folder; models of the hub are downloaded into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from oneblock.errors import OneblockError

# Safetensors and text, never pickles or code. Subfolders hold other formats of the same model.
ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe"]
IGNORED = ["*/*", "consolidated*"]
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def resolve(path_or_name: str | Path) -> Path:
    """The folder (or file) at a path; if there is none, the downloaded folder of `org/name` or `org/name@revision`.

    Downloads honour HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. OneblockError if there is neither.
    """
    path = Path(path_or_name).expanduser()
    if path.exists():
        return path
    name = NAME.fullmatch(str(path_or_name))
    if isinstance(path_or_name, Path) or name is None:
        raise OneblockError(f"{path_or_name}: no such folder; give a model folder, or an org/name on the hub")
    return _download(name["repo"], name["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download  # slow to import, and only needed here

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=ALLOWED, ignore_patterns=IGNORED)
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
