"""The C++ sources here to operators: compiled once for this processor and this torch, kept between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.files import replace_file
from oneblock.kernels.compiler import compiler, kept

SOURCE = Path(__file__).parent / "cpp" / "operators.cpp"
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-std=c++20")
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni")
SECONDS = 120  # the compiler usually takes 3


def available() -> bool:
    """Whether there are `torch.ops.oneblock_rows` (operators.cpp). Compiles them at first use."""
    return loaded()


def fits(x: Tensor) -> bool:
    """Whether they can have x: on a CPU, in bf16, and nobody asks for gradients."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and available()


# A constant for torch.compile: torch.compiler.assume_constant_result without its import of the compiler, a second.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def loaded() -> bool:
    if missing():
        return False
    torch.ops.load_library(cached())
    register_shapes()
    return True


@cache
def missing() -> str:
    """Why there are no operators here; empty where there are."""
    if os.environ.get("ONEBLOCK_KERNELS") == "0":
        return "ONEBLOCK_KERNELS is 0"
    lacking = [flag for flag in NEEDED if flag not in processor_flags()]
    if lacking:
        return f"this processor has no {lacking[0]}"
    if cached().exists():
        return ""
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler ({compiler()})"
    try:
        compile_to(cached())
    except OneblockError as e:
        return str(e)
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        return f"{compiler()} failed: {said[0] if said else e}"
    return ""


@cache
def processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


@cache
def cached() -> Path:
    """Where the operators of this source, this torch and this processor are kept."""
    sources = (path.read_text() for path in sorted(SOURCE.parent.glob("*.[ch]*")))
    what = [*sources, torch.__version__, compiler(), *FLAGS, *sorted(processor_flags())]
    name = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
    return kept("kernels") / f"{name}.so"


def compile_to(path: Path) -> None:
    """Compile the operators into a shared library at `path`; several processes may do so at once."""
    root = Path(torch.__file__).parent
    with replace_file(path) as new:
        paths = (f"-I{root / 'include'}", str(SOURCE), "-o", str(new), f"-L{root / 'lib'}", "-ltorch_cpu")
        subprocess.run([compiler(), *FLAGS, *paths], check=True, capture_output=True, timeout=SECONDS)


def register_shapes() -> None:
    """What each operator returns, for torch.compile."""

    def linear(
        x: Tensor,
        w: list[Tensor],
        scales: list[Tensor],
        groups: list[Tensor],
        biases: list[Tensor],
        rows: list[int],
        blocks: list[int],
    ) -> Tensor:
        return x.new_empty(x.numel() // x.shape[-1], sum(rows))

    def rest(x: Tensor, y: Tensor, *how: object) -> Tensor:
        return torch.empty_like(x)

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        return q.new_empty(q.shape)

    for fake in (linear, rest, attend):
        torch.library.register_fake(f"oneblock_rows::{fake.__name__}", fake)
