"""Import order of packages, import cycles between files, and which packages stay light or free of devices."""

from __future__ import annotations

import ast
import re
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
LIGHT = ["spec", "plan"]  # standard library only


def package_of(path: Path) -> str:
    """`src/oneblock/model/rope.py` -> `model`, `src/oneblock/cli.py` -> `cli`."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """The dotted names of all imported modules, at any depth of the file; a submodule of a package by its own name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the module's full name"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if file_of(name) or node.module == "oneblock" else node.module


def file_of(module: str) -> Path | None:
    """The file of one of our modules: `oneblock.model.rope` -> src/oneblock/model/rope.py."""
    path = SRC.parent.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if module.startswith("oneblock") and file.exists()), None)


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_package_imports_only_packages_above_it(path: Path) -> None:
    package = package_of(path)
    assert package in ORDER, f"{package} has no place in the order"
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        target = rest.split(".")[0]
        if top != "oneblock" or (not (SRC / target).exists() and not (SRC / f"{target}.py").exists()):
            continue
        assert ORDER.index(target) <= ORDER.index(package), f"{package} imports {module}"


def test_no_import_cycle_between_files() -> None:
    imports = {path: {file_of(module) for module in imported_modules(path)} - {None, path} for path in FILES}
    in_cycles = set(FILES)
    while True:  # drop files that import none of the others, or that none of the others imports
        imported = {file for path in in_cycles for file in imports[path] & in_cycles}
        remaining = {path for path in in_cycles & imported if imports[path] & in_cycles}
        if remaining == in_cycles:
            break
        in_cycles = remaining
    assert sorted(str(path.relative_to(SRC)) for path in in_cycles) == []


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) in LIGHT], ids=lambda p: str(p.relative_to(SRC)))
def test_spec_and_plan_import_only_the_standard_library(path: Path) -> None:
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert top == "oneblock" or top in sys.stdlib_module_names, f"{path.name} imports {module}"


DEVICE_DEPENDENT = r"device\.type|is_cuda|is_compiling|autocast|bfloat16|float16|register_\w*hook|\.cuda\b"


@pytest.mark.parametrize("path", sorted((SRC / "model").glob("*.py")), ids=lambda p: p.name)
def test_the_model_knows_no_device_compilation_or_autocast(path: Path) -> None:
    assert re.findall(DEVICE_DEPENDENT, path.read_text(encoding="utf-8")) == []


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
