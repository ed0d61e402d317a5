"""What the README shows, done: Python blocks run, command lines parse (of every page), figures are those of `plan`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import oneblock
from oneblock import cli, config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PYTHON = blocks(PAGES[0], "python")
COMMANDS = [
    line.removeprefix("$ ").split("  #")[0]
    for page in PAGES
    for block in blocks(page, "(?:sh)?")
    for line in block.splitlines()
    if line.removeprefix("$ ").startswith("oneblock ")
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "path/or/org/name" in code:
        folder = request.getfixturevalue("data") / "weights" / "stories260k"
        code = code.replace('"path/or/org/name"', repr(str(folder)))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {})


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line: str) -> None:
    name, *argv = shlex.split(line)[1:]
    _, options = cli.load(name)
    assert isinstance(config.parse(options, argv, f"oneblock {name}"), options)


SHOWN = [block for block in blocks(PAGES[0], "") if block.startswith("$ oneblock ")]


@pytest.mark.parametrize("block", SHOWN, ids=[block.split("\n")[0] for block in SHOWN])
def test_outputs_are_what_the_commands_print(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, *shown = block.splitlines()
    assert cli.main(shlex.split(line)[2:]) == 0
    printed = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    told = [" ".join(row.split()) for row in shown if row != "..." and "──" not in row]
    assert [row for row in told if row not in printed] == []


def test_the_comparison_says_what_the_plan_says() -> None:
    row = r"^\| [^|]+ \| ([\d,]+)[ B]*\| ([\d,]+)[ B]*\| ([\d.]+) \|$"
    rows = re.findall(row, PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)
    gpt2, llama = (oneblock.plan_model(oneblock.get_spec(name), context=8192) for name in ("gpt2", "llama-3-8b"))
    figures = [
        (gpt2.params_total, llama.params_total),
        (gpt2.kv_bytes, llama.kv_bytes),
        (gpt2.flops_prefill, llama.flops_prefill),
        (gpt2.flops_decode, llama.flops_decode),
    ]
    assert [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b, _ in rows] == figures
    assert [ratio for *_, ratio in rows] == [f"{b / a:.3g}" for a, b in figures]
