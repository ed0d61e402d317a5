"""The house has one downward order: a package imports only from those above it, and the light ones stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "oneblock"
ORDER = [
    "errors",
    "config",
    "flags",
    "files",
    "units",
    "constants",
    "spec",
    "plan",
    "text",
    "images",
    "model",
    "kernels",
]
ORDER += ["quant", "adapters", "parallel", "store", "infer", "data", "train", "tune", "eval", "trace", "serve"]
ORDER += ["lineage", "demo", "cli", "__init__", "__main__"]
LIGHT = ["spec", "plan"]  # these stand on the standard library alone


def part(path: Path) -> str:
    """`src/oneblock/model/rope.py` -> `model`, `src/oneblock/cli.py` -> `cli`."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def modules(path: Path) -> Iterator[str]:
    """Every module the file imports, wherever in it: `oneblock.model.rope`, `torch.nn`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the module's whole name"
            assert node.module is not None
            # `from oneblock import model` imports a part; `from oneblock.model import Decoder` names it already
            whole = node.module == "oneblock"
            yield from (f"oneblock.{alias.name}" for alias in node.names) if whole else [node.module]


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_package_imports_only_from_those_above_it(path: Path) -> None:
    here = part(path)
    assert here in ORDER, f"{here} has no place in the order"
    for module in modules(path):
        top, _, rest = module.partition(".")
        target = rest.split(".")[0]
        if top != "oneblock" or (not (SRC / target).exists() and not (SRC / f"{target}.py").exists()):
            continue
        assert ORDER.index(target) <= ORDER.index(here), f"{here} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in LIGHT], ids=lambda p: str(p.relative_to(SRC)))
def test_spec_and_plan_stand_on_the_standard_library(path: Path) -> None:
    for module in modules(path):
        top = module.split(".")[0]
        assert top == "oneblock" or top in sys.stdlib_module_names, f"{path.name} imports {module}"


LIGHT_STARTS = [
    "import oneblock",
    "import oneblock.spec, oneblock.plan, oneblock.text, oneblock.store.config",
    "import oneblock.cli; oneblock.cli.main(['--help'])",
    "import oneblock; oneblock.plan_model(oneblock.get_spec('llama-3-8b'), context=8192)",
]


@pytest.mark.parametrize("code", LIGHT_STARTS)
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    check = "; import sys; sys.exit(' '.join({'torch', 'transformers', 'matplotlib'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
