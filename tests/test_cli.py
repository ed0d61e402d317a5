from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oneblock import __version__
from oneblock.cli import COMMANDS, load, main
from oneblock.flags import list_flags


def python(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, env=env)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == main(["help"]) == 0
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert out.count(f"\n  {name} ") == out.count(command.help) == 3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"oneblock {__version__}\n"


def test_help_is_quick_and_needs_no_torch() -> None:
    began = time.perf_counter()
    found = python("-X", "importtime", "-m", "oneblock", "--help")
    assert time.perf_counter() - began < 5
    assert "usage: oneblock" in found.stdout
    assert "torch" not in found.stderr
    assert "tyro" not in found.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_torch(name: str) -> None:
    code = (
        f"import sys, oneblock.cli as c; code = c.main([{name!r}, '--help']); sys.exit(code or 'torch' in sys.modules)"
    )
    found = python("-c", code)
    assert found.returncode == 0, found.stderr
    assert f"usage: oneblock {name}" in found.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_one_dataclass(name: str) -> None:
    _, options = load(name)
    assert list(list_flags(options))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--learn"], "unknown flag"),
        (["demo", "--sed"], "--seed?"),
    ],
)
def test_wrong_usage(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m oneblock models | head -1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0
    assert found.stderr == ""


def test_debug_shows_where(tmp_path: Path) -> None:
    quiet = python("-m", "oneblock", "train", "--data", str(tmp_path / "x"))
    loud = python("-m", "oneblock", "train", "--data", str(tmp_path / "x"), "--debug")
    assert quiet.returncode == loud.returncode == 1
    assert quiet.stderr.count("\n") == 1
    assert "Traceback" in loud.stderr
