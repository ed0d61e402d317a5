"""A name to a folder: one that is here, or one fetched through huggingface_hub into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from oneblock.errors import OneblockError

# Weights as safetensors, and text; never pickles or code. Files of sub-folders are other forms of the same model.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe"]
UNWANTED = ["*/*", "consolidated*"]
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def resolve(path_or_name: str | Path) -> Path:
    """The folder (or file) at a path, or that of `org/name` or `org/name@revision`.

    Downloads honour HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. OneblockError where there is neither.
    """
    path = Path(path_or_name).expanduser()
    if path.exists():
        return path
    name = NAME.fullmatch(str(path_or_name))
    if isinstance(path_or_name, Path) or name is None:
        raise OneblockError(f"{path_or_name}: no such folder; give a model's folder, or its org/name on the hub")
    return _download(name["repo"], name["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download  # slow to import, and only needed here

    called = repo if revision is None else f"{repo}@{revision}"
    try:
        found = snapshot_download(repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    except errors.GatedRepoError as error:
        raise OneblockError(f"{called}: needs its licence accepted on its page, and your token in HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise OneblockError(f"{called}: has no such revision; give a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise OneblockError(
            f"{called}: no such folder here, and no such model on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise OneblockError(
            f"{called}: no such folder here, not in the cache, and the hub cannot be reached; check the name, the "
            f"connection and HF_HUB_OFFLINE"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise OneblockError(f"{called}: could not be downloaded ({reason}); try again") from error
    return Path(found)
