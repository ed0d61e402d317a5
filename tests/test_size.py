"""A budget of Python code lines per package: a change that needs more raises its line here, and its commit says why."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

SRC = Path(__file__).parent.parent / "src" / "oneblock"
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

BUDGET: dict[str, int] = {
    "__init__": 28,
    "__main__": 3,
    "cli": 160,
    "config": 167,
    "constants": 7,
    "data": 715,
    "demo": 172,
    "errors": 6,
    "files": 130,
    "flags": 206,
    "infer": 2073,
    "kernels": 699,
    "lineage": 396,
    "model": 610,
    "parallel": 677,
    "plan": 642,
    "quant": 490,
    "spec": 780,
    "store": 2755,
    "text": 1110,
    "train": 2608,
    "units": 29,
}


def code_lines(path: Path) -> int:
    """Lines without comments, docstrings and blanks."""
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None and first is not None and first.end_lineno:
                lines |= set(range(first.lineno, first.end_lineno + 1))
    return lines


def test_packages_keep_their_budget() -> None:
    counts: Counter[str] = Counter()
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).parts
        counts[parts[0].removesuffix(".py")] += code_lines(path)
    assert counts.keys() == BUDGET.keys(), "a package without a line in the budget, or a line without a package"
    assert {name: n for name, n in counts.items() if n > BUDGET[name]} == {}
