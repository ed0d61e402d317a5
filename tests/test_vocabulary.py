"""The field's terms are the names: old identifiers, flags and file names stay out of source, docs and help."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from oneblock.cli import COMMANDS, load
from oneblock.flags import help_text, list_flags

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "oneblock"
PYTHON = sorted([*SRC.rglob("*.py"), *ROOT.glob("benchmarks/*.py")])
CPP = sorted(SRC.rglob("*.h")) + sorted(SRC.rglob("*.cpp"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*")])

# Names that stood for a term of the field. Words of this list may appear in prose, but name nothing.
IDENTIFIERS = """
Step asked asking sees visible ordered mixed placed turn turned lowered by_products _products_pay _written_out
_later embedded dropped _sees looped_product fast slow tempering streamline streamlined Streamed streamed
Rest Inner Normed Read weigh alike alone even held put each_alone Coded Bits coded CodedEmbedding CodedExperts
Ranges in_4_bits in_8_bits in_float8 corrected encoded decoded Texts Event forget advance peek Guess Guesser Tally
Lookup Draft guess guesses guessed settle settled Choices adjusted luck Shapes Constraint Matcher Matchers lengthen
lengthened Columns Summed Over Kept Setup judges agree averaged Made good judge Elsewhere Parted Receiving Sending
GatheredKeys Parts Learner Engine steer Sink Rows Side Said found said told wanted whole seen NEIGHBOURS_10K
zero_out
""".split()  # noqa: SIM905
FLAGS = """
--guesses --draft --cache-bits --accumulate --ramp --final --zero-out --clip --recompute --rope --batch --gate --no-gate
--utilisation --image --balance
""".split()  # noqa: SIM905
FILES = """
streamline.py longer.py saved.py pages.py codes.py calibrate.py constrain.py gate.py show.py sinks.py session.py
assemble.py rows.py words.py cuts.py settings.py step.py ranks.py products.h between.h rest.h
""".split()  # noqa: SIM905
PHRASES = ["is no number", "no numbers", "are no number", "mend ", "mends", "mended", "written aside", "its own luck"]


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """Every name that the file defines: functions, classes, arguments, variables, attributes of self."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_old_identifier(path: Path) -> None:
    assert [f"{line}: {name}" for line, name in identifiers(path) if name.lstrip("_") in IDENTIFIERS] == []


@pytest.mark.parametrize("path", CPP, ids=lambda p: p.name)
def test_no_old_identifier_in_cpp(path: Path) -> None:
    code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    names = r"\b(turned|weigh|rest|products|Given|room|alike|held|seen|found)\b"
    assert re.findall(names, code) == []


def test_no_old_file_name() -> None:
    assert [str(p.relative_to(ROOT)) for p in [*PYTHON, *CPP] if p.name in FILES] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_old_name_in_pages(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    flags = [flag for flag in FLAGS if re.search(rf"(?<![\w-]){flag}(?![\w-])", text)]
    files = [name for name in FILES if re.search(rf"(?<![\w.-]){re.escape(name)}\b", text)]
    names = [name for name in IDENTIFIERS if re.search(rf"`{name}`", text)]
    phrases = [phrase for phrase in PHRASES if phrase in text]
    assert flags + files + names + phrases == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_old_phrase_in_source(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [phrase for phrase in PHRASES if phrase in text] == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_begin_with_a_subject(path: Path) -> None:
    """No docstring opens with a fragment: "Of its norms, ..", "What a layer ..", "Those that ..", "By name, of .."."""
    docs = [
        (node.lineno, (ast.get_docstring(node) or "").split("\n")[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    assert [f"{n}: {line}" for n, line in docs if re.match(r"(Of|What|That which|Those|By name,)\b", line)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_no_old_name_in_help(name: str) -> None:
    _, options = load(name)
    assert not {f"--{flag.name}" for flag in list_flags(options)} & set(FLAGS)
    text = help_text(options, f"oneblock {name}", COMMANDS[name].examples)
    assert [phrase for phrase in PHRASES if phrase in text] == []
