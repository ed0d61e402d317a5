"""Compiles the C++ kernels once per processor, torch version and source, and keeps the libraries between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.files import replace_file

SOURCE = Path(__file__).parent / "cpp" / "operators.cpp"
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-std=c++20")
REQUIRED_CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni")
COMPILE_TIMEOUT = 120  # seconds; compiling usually takes 3
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def is_available() -> bool:
    """Whether `torch.ops.oneblock_cpu` (operators.cpp) exists. Compiles it at first use."""
    return load_kernels()


def can_use_kernels(x: Tensor) -> bool:
    """Whether the kernels accept x: on a CPU, in bf16, without gradients."""
    return x.is_cpu and x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and is_available()


def use_kernel(x: Tensor) -> bool:
    """Whether a small operator on x runs as our kernel: not in a compiled graph, where inductor fuses it better."""
    return can_use_kernels(x) and not torch.compiler.is_compiling()


# A constant for torch.compile: torch.compiler.assume_constant_result without its import of the compiler, a second.
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def load_kernels() -> bool:
    if unavailable_reason():
        return False
    torch.ops.load_library(library_path())
    register_fakes()
    return True


@cache
def unavailable_reason() -> str:
    """Why there are no kernels on this machine; empty if there are."""
    if os.environ.get("ONEBLOCK_KERNELS") == "0":
        return "ONEBLOCK_KERNELS is 0"
    missing = [flag for flag in REQUIRED_CPU_FLAGS if flag not in cpu_flags()]
    if missing:
        return f"this processor has no {missing[0]}"
    if library_path().exists():
        return ""
    if not has_compiler():
        return f"no C++ compiler found ({compiler_name()})"
    try:
        compile_library(library_path())
    except OneblockError as e:
        return str(e)
    except (OSError, subprocess.SubprocessError) as e:
        lines = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        return f"{compiler_name()} failed: {lines[0] if lines else e}"
    return ""


@cache
def cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


@cache
def library_path() -> Path:
    """The compiled library's path, a hash of the source, torch's version, the compiler and the processor."""
    sources = (path.read_text() for path in sorted(SOURCE.parent.glob("*.[ch]*")))
    key = [*sources, torch.__version__, compiler_name(), *FLAGS, *sorted(cpu_flags())]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    return cache_dir("kernels") / f"{name}.so"


def compile_library(path: Path) -> None:
    """Compile the operators into a shared library at `path`; several processes may do so at once."""
    root = Path(torch.__file__).parent
    with replace_file(path) as new:
        paths = (f"-I{root / 'include'}", str(SOURCE), "-o", str(new), f"-L{root / 'lib'}", "-ltorch_cpu")
        subprocess.run([compiler_name(), *FLAGS, *paths], check=True, capture_output=True, timeout=COMPILE_TIMEOUT)


def register_fakes() -> None:
    """Register the output shape of each operator that compiled graphs contain."""

    def linear(x: Tensor, *args: Any) -> Tensor:
        return x.new_empty(x.numel() // x.shape[-1], sum(args[4]))  # rows of each matrix

    def fused_post_attention(x: Tensor, *args: Any) -> Tensor:
        return torch.empty_like(x)

    def decode_attention(q: Tensor, *args: Any) -> Tensor:
        return q.new_empty(q.shape)

    for fake in (linear, fused_post_attention, decode_attention):
        torch.library.register_fake(f"oneblock_cpu::{fake.__name__}", fake)


# ------------------------------------------------------------------ the compiler, also torch.compile's


def compiler_name() -> str:
    """The C++ compiler, chosen as torch chooses it; asking torch costs a second."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def has_compiler() -> bool:
    return shutil.which(compiler_name()) is not None


def cache_dir(kind: str) -> Path:
    """The user's cache folder for compiled programs of a kind; unlike the temporary folder it survives a reboot."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oneblock" / kind


def use_compile_cache() -> None:
    """Let torch.compile keep its programs in `cache_dir`, unless the environment names another folder."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(INDUCTOR_CACHE, default_cache_dir()) == default_cache_dir():  # importing torch sets its default
        os.environ[INDUCTOR_CACHE] = str(cache_dir("compiled"))
