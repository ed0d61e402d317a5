"""What every test gets: no network, one thread, and the folder of real data where there is one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "COLUMNS": "120", "NO_COLOR": "1"}
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin make a busy machine several times slower

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the models are too small to share out; tests run side by side instead


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real texts, tokenizers and weights: `ONEBLOCK_DATA`, or `../shared/data` beside the project."""
    folder = Path(os.environ.get("ONEBLOCK_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (ONEBLOCK_DATA names the folder)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """A test that reaches for the network fails at once."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"tests do not use the network ({address[0]})")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture
def device() -> str:
    """The accelerator of a test marked `gpu`."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
