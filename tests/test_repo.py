"""The repository keeps its own promises: small files, short functions, shallow classes, a true README, few packages."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import oneblock

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "oneblock"
FILES = sorted(SRC.rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
Function = ast.FunctionDef | ast.AsyncFunctionDef

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def arguments(function: Function) -> list[ast.arg]:
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]


def is_method(function: Function) -> bool:
    first = [*function.args.posonlyargs, *function.args.args][:1]
    return any(arg.arg.lstrip("_") in ("self", "cls") for arg in first)


def is_builder(path: Path, function: Function) -> bool:
    """Whether it is a family's builder: its arguments are every field that a model of the family can vary."""
    return path.parent.name == "families" and any("family" in ast.unparse(d) for d in function.decorator_list)


# ------------------------------------------------------------------ size


@each_file
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


@each_file
def test_functions_are_short(path: Path) -> None:
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno}
    assert {name: n for name, n in lengths.items() if n > 40} == {}


@each_file
def test_functions_take_few_arguments(path: Path) -> None:
    counts = {f.name: len(arguments(f)) - is_method(f) for f in functions(path) if not is_builder(path, f)}
    assert {name: n for name, n in counts.items() if n > 8} == {}


@each_file
def test_everything_is_annotated(path: Path) -> None:
    bare = [f.name for f in functions(path) if f.returns is None and f.name != "__init__"]
    for function in functions(path):
        known = arguments(function)[is_method(function) :]
        bare += [f"{function.name}({a.arg})" for a in known if a.annotation is None]
    assert bare == []


def test_classes_are_one_level_deep() -> None:
    """A class of ours may extend a library's class, or a plain base of ours, but never a class that extends ours."""
    bases: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(b).split("[")[0].split(".")[-1] for b in node.bases}
    deep = [name for name, above in bases.items() for base in above if bases.get(base, set()) & bases.keys()]
    assert deep == []


# ------------------------------------------------------------------ pages


def test_the_readme_lists_every_file_of_the_package_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```\nsrc/oneblock/\n(.*?)```", text, re.DOTALL)
    assert found is not None, "README.md has no tree that starts with src/oneblock/"
    listed, folder = [], ""
    for line in found[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if name.endswith("/"):
            folder = (folder.split("/")[0] + "/" if indent > 2 else "") + name
        else:
            listed.append((folder if indent > 2 else "") + name)
        assert name.endswith("/") or len(line.split()) > 1, f"no word about {name}"
    here = [str(p.relative_to(SRC)) for p in FILES if p.name != "__init__.py" or p.parent == SRC]
    assert sorted(listed) == sorted(here)


@each_page
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    links += re.findall(r'(?:src|href)="([^"]+)"', text)
    near = [link for link in links if link and "://" not in link]
    assert [link for link in near if not (page.parent / link).exists()] == []
    assert [link for link in near if ROOT not in (page.parent / link).resolve().parents] == []


def test_the_changelog_and_the_package_agree_on_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert oneblock.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------ packages


def closure(requirements: list[str]) -> set[str]:
    """Every package that installing these would bring here, by the installed packages' own metadata."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        deeper = (Requirement(line) for line in metadata.requires(name) or [])
        extras = ["", *requirement.extras]
        waiting += [r for r in deeper if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


def test_a_plain_install_is_small() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {p for p in closure(project["dependencies"]) if not p.startswith(("nvidia-", "cuda-", "triton"))}
    assert {"torch", "numpy", "tokenizers", "jinja2"} <= packages
    assert len(packages) <= 50, sorted(packages)


def test_the_pins_hold_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins: dict[str, str] = {}
    for file in ("requirements.txt", "requirements-test.txt"):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        pins |= dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert "torch" not in pins
    for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        asked = Requirement(line)
        if asked.name != "torch":
            assert asked.specifier.contains(pins[canonicalize_name(asked.name)]), line
