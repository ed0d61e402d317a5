"""The C++ compiler that torch.compile and our kernels need, and where what it makes stays between runs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def compiler() -> str:
    """Its name, chosen as torch chooses it; asking torch costs a second."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler_found() -> bool:
    return shutil.which(compiler()) is not None


def kept(kind: str) -> Path:
    """The folder for programs of a kind: not in the system's folder for what is thrown away."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oneblock" / kind


def keep_compiled() -> None:
    """Tell torch.compile to keep its programs there, unless the environment names another place than torch's own."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(FOLDER, default_cache_dir()) == default_cache_dir():  # torch writes its own there when imported
        os.environ[FOLDER] = str(kept("compiled"))
