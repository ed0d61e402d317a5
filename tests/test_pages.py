"""Every command and every Python block of README.md and docs/*.md runs, page by page from top to bottom.

Fences: `sh` and `console` hold commands (in `console` behind `$ `, followed by output), `python` runs, anything else is
shown only. A block that cannot run here says why in its info string, "sh parse-only: needs torchrun"; its syntax and
its `oneblock` flags are then checked. `py` holds quotes of the source, which tests/spec/test_adding_a_family.py checks.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import oneblock
from oneblock import cli, flags
from oneblock.config import load_toml
from oneblock.model import Decoder, init_weights
from oneblock.store.save import write_model
from oneblock.text import train_bpe
from oneblock.train.options import Train, flatten

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
REASONS = ("needs a network", "needs a GPU", "needs torchrun", "needs an external program")

# Flags appended to a command so that it takes seconds: {words that the command has: flags}; the first match counts.
SMALL = {
    "train --resume": "",
    "train --config": "--steps 3",
    "train --init": "--steps 3 --batch-size 2 --no-preflight --no-tensorboard --eval-batches 2 --compile off",
    "train": "--steps 3 --dim 32 --n-layers 2 --n-heads 2 --n-kv-heads 2 --head-dim 16 --hidden-dim 64 --context 64"
    " --batch-size 2 --no-preflight --no-tensorboard --eval-batches 2 --compile off",
    "generate": "--max-tokens 8",
    "chat": "--max-tokens 8",
    "data prepare": "--workers 1",
    "tokenizer --train": "--vocab 300",
    "demo": "--seconds 15",
}
# Text replaced in Python blocks, for the same reason or because a name stands for the reader's own model.
REPLACED = {'"path/or/org/name"': '"path/to/model"', "steps=200": "steps=3", "steps=2000": "steps=3"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    reason: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command with the output lines shown below it."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "sh":
            return [(line, []) for line in lines if line.strip() and not line.startswith("#")]
        found: list[tuple[str, list[str]]] = []
        for line in lines:
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                assert found, f"{self}: output before the first command"
                found[-1][1].append(line)
        return found


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        language, _, reason = match[1].partition(" parse-only: ")
        line = text[: match.start()].count("\n") + 1
        blocks.append(Block(page, line, language.strip(), reason or None, match[2]))
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
PARSE_ONLY = [block for block in BLOCKS if block.reason is not None]


def split_oneblock(command: str) -> list[str] | None:
    """The arguments after `oneblock` or `-m oneblock`, if the command runs it."""
    words = shlex.split(command, comments=True)
    names = ("oneblock", ".venv/bin/oneblock")
    at = next((i for i, word in enumerate(words) if word in names and (i == 0 or words[i - 1] == "-m")), None)
    return None if at is None else words[at + 1 :]


# ------------------------------------------------------------------ blocks that are only parsed


@each_page
def test_fences(page: Path) -> None:
    """Every block has a language or shows no command."""
    known = ("sh", "console", "python", "py", "text", "json", "toml", "")
    blocks = read_blocks(page)
    assert [f"{block}: {block.language}" for block in blocks if block.language not in known] == []
    command = re.compile(r"^(\$ |oneblock |torchrun |make |pip |git )", re.MULTILINE)
    shown = [block for block in blocks if block.language in ("", "text", "json")]
    assert [str(block) for block in shown if command.search(block.text)] == []


@pytest.mark.parametrize("block", PARSE_ONLY, ids=str)
def test_blocks_that_are_only_parsed(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block.reason in REASONS
    if block.language == "python":
        compile(block.text, str(block), "exec")
        return
    for command, _ in block.commands():
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command
        if (argv := split_oneblock(command)) is not None:
            _, options = cli.load(argv[0])
            assert isinstance(flags.parse(options, argv[1:], f"oneblock {argv[0]}"), options)


# ------------------------------------------------------------------ blocks that run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages mention: texts, prompts, a schema, a grammar, a small model with a chat template."""
    folder = tmp_path_factory.mktemp("pages")
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    (folder / "book.txt").write_text(text, encoding="utf-8")
    (folder / "other.txt").write_text(text[:8000], encoding="utf-8")
    (folder / "corpus").mkdir()
    documents = [json.dumps({"text": part}) for part in text.split("\n## ")]
    for i in range(2):
        (folder / "corpus" / f"{i}.jsonl.gz").write_bytes(gzip.compress("\n".join(documents[i::2]).encode()))
    prompts = [{"prompt": "Once upon a time"}, {"id": "b", "messages": [{"role": "user", "content": "Is water wet?"}]}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    for name in ("schema.json", "person.json"):
        (folder / name).write_text(json.dumps(schema))
    (folder / "sum.lark").write_text("start: NUMBER\nNUMBER: /[0-9]+/\n")
    write_small_model(folder / "path" / "to" / "model", folder / "book.txt", layers=2)
    for name in ("draft", "tokenizer"):
        write_small_model(folder / "path" / "to" / name, folder / "book.txt", layers=1)
    return folder


def write_small_model(folder: Path, text: Path, layers: int) -> None:
    tokenizer = train_bpe([text], 400)
    model = Decoder(
        oneblock.get_spec("llama", vocab=400, dim=64, n_layers=layers, n_heads=4, n_kv_heads=2, context=256)
    )
    init_weights(model, seed=0)
    folder.mkdir(parents=True)
    write_model(folder, model.bfloat16())
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"chat_template": TEMPLATE}))


def shorten(argv: list[str]) -> list[str]:
    """The arguments with the flags of SMALL, and file patterns expanded."""
    extra = next((small for words, small in SMALL.items() if set(words.split()) <= set(argv)), "")
    files = [sorted(glob.glob(word)) if "*" in word else [word] for word in argv]
    return [word for words in files for word in words] + extra.split()


def run_command(block: Block, command: str, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = split_oneblock(command)
    if argv is None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-c", command], check=True, env=os.environ | {"PATH": path})
        return
    capsys.readouterr()
    code = cli.main(shorten(argv))
    out, err = capsys.readouterr()
    assert code == 0, f"{block}: {command}\n{err}"
    printed = [" ".join(row.split()) for row in out.splitlines()]
    rows = [" ".join(row.split()) for row in shown if row not in ("...", "") and "──" not in row]
    assert [row for row in rows if row not in printed] == [], f"{block}: {command}\n{out}"


@each_page
def test_commands_and_python_blocks_run(
    page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    for block in read_blocks(page):
        if block.reason is None and block.language == "python":
            text = block.text
            for old, new in REPLACED.items():
                text = text.replace(old, new)
            torch.manual_seed(0)
            exec(compile("\n" * block.line + text, str(page), "exec"), names)
        elif block.reason is None and block.language in ("sh", "console"):
            for command, shown in block.commands():
                monkeypatch.setattr("sys.stdin", StringIO("Hello\n"))
                run_command(block, command, shown, capsys)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=str)
def test_configuration_files_load(block: Block, tmp_path: Path) -> None:
    """Each TOML block is a valid configuration, and sets every option that is not a path or a command's switch."""
    (tmp_path / "run.toml").write_text(block.text)
    options = load_toml(Train, tmp_path / "run.toml")
    skipped = {"init", "out", "resume", "allow_changes", "config", "dry_run", "seconds", "track"}
    given = flags.typed_fields(Train, ["--config", str(tmp_path / "run.toml")])
    assert set(flatten(options)) - skipped - given == set()


# ------------------------------------------------------------------ figures


def test_the_comparison_table_equals_the_plan() -> None:
    row = r"^\| [^|]+ \| ([\d,]+)[ B]*\| ([\d,]+)[ B]*\| ([\d.]+) \|$"
    rows = re.findall(row, README.read_text(encoding="utf-8"), re.MULTILINE)
    gpt2, llama = (oneblock.plan_model(oneblock.get_spec(name), context=8192) for name in ("gpt2", "llama-3-8b"))
    figures = [
        (gpt2.params_total, llama.params_total),
        (gpt2.kv_bytes, llama.kv_bytes),
        (gpt2.flops_prefill, llama.flops_prefill),
        (gpt2.flops_decode, llama.flops_decode),
    ]
    assert [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b, _ in rows] == figures
    assert [ratio for *_, ratio in rows] == [f"{b / a:.3g}" for a, b in figures]


def test_the_readme_counts_models_and_families() -> None:
    from oneblock.spec.names import FAMILIES, MODELS

    assert f"{len(MODELS)} published models of {len(FAMILIES)} families" in README.read_text(encoding="utf-8")


# ------------------------------------------------------------------ glossary

GLOSSARY = re.findall(r"^\| (.+?) \| .+ \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)


def test_the_glossary_is_sorted() -> None:
    terms = [term.casefold() for term, _ in GLOSSARY[1:]]
    assert len(terms) >= 80 and terms == sorted(set(terms))


@pytest.mark.parametrize(("term", "where"), GLOSSARY[1:], ids=[term for term, _ in GLOSSARY[1:]])
def test_glossary_names_exist(term: str, where: str) -> None:
    """The file exists, and it contains the name behind the last dot, or the field of a flag."""
    if where == "planned":
        return
    file, *names = re.findall(r"`([^`]+)`", where)
    text = (ROOT / "src" / "oneblock" / file).read_text(encoding="utf-8")
    words = [name.removeprefix("--").replace("-", "_").split(".")[-1] for name in names]
    assert [word for word in words if not re.search(rf"\b{word}\b", text)] == []
