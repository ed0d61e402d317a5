"""Files and folders are replaced whole or not at all, and every failure to write is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oneblock.errors import OneblockError
from oneblock.files import refuse_same_folder, replace_file, replace_folder, write_file, write_files
from oneblock.model import Decoder
from oneblock.spec import FAMILIES
from oneblock.store import save_model
from oneblock.text import train_bpe

SPEC = FAMILIES["llama"](vocab=300, dim=64, n_heads=2, n_layers=1, hidden_dim=64, context=64)
LIMITED = """
import resource, sys
from oneblock.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def run_limited(limit: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command whose files the system cuts off at `limit` bytes, as a full disk does."""
    argv = [sys.executable, "-c", LIMITED, str(limit), *map(str, command)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_model(folder, Decoder(SPEC))
    train_bpe(["the cat sat on the mat. " * 20], 290).save(folder)
    return folder


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "x.txt", "old\r\n")
    with pytest.raises(RuntimeError), replace_file(tmp_path / "a" / "x.txt") as new:
        new.write_text("half")
        raise RuntimeError("stopped")
    with pytest.raises(OneblockError, match=r"y\.txt: could not be written \(.*\); free disk space or choose another"):
        write_file(tmp_path / "a" / "x.txt" / "y.txt", "its folder is a file")
    assert contents(tmp_path) == {"a/x.txt": b"old\r\n"}


def test_several_files_change_together(tmp_path: Path) -> None:
    write_files(tmp_path, {"x": "old", "y": b"old"})
    (tmp_path / "z").mkdir()
    with pytest.raises(OneblockError, match="z: is a folder; name the file to write"):
        write_files(tmp_path, {"x": "new", "y": "new", "z": "new"})
    assert contents(tmp_path) == {"x": b"old", "y": b"old"}


def test_only_regular_files_are_replaced_and_links_are_followed(tmp_path: Path) -> None:
    write_file(tmp_path / "x", "old")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path) == {"x": b"new", "link": b"new"}
    with pytest.raises(OneblockError, match="/dev/null: is not a regular file"):
        write_file("/dev/null", "")
    with pytest.raises(OneblockError, match="x: is a file; choose a folder"), replace_folder(tmp_path / "x"):
        pass


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    code = "import os, sys; from oneblock.files import replace_file\nwith replace_file(sys.argv[1]) as new:\n"
    code += "    new.write_text('half'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x[1]")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with replace_file(tmp_path / "x[1]") as running:
        running.write_text("first")
        write_file(tmp_path / "x[1]", "second")
        assert running.exists()
    assert contents(tmp_path) == {"x[1]": b"first"}


def test_an_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(OneblockError, match="link: is the input, which would be overwritten; choose another output"):
        refuse_same_folder(tmp_path / "link", f"{tmp_path}/x/../model/")
    refuse_same_folder(tmp_path / "other", tmp_path / "model")


# ------------------------------------------------------------------ commands on a full disk


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
@pytest.mark.parametrize("limit", [10, 3000])
def test_quantize(model: Path, limit: int, tmp_path: Path) -> None:
    save_model(tmp_path / "out", Decoder(FAMILIES["llama"](vocab=11, dim=8, n_heads=2, n_layers=1, hidden_dim=8)))
    before = contents(tmp_path)
    run = run_limited(limit, "quantize", model, tmp_path / "out")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert f"{tmp_path / 'out'}: could not be written" in run.stderr
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
@pytest.mark.parametrize("limit", [10, 1000])
def test_tokenizer(limit: int, tmp_path: Path) -> None:
    train_bpe(["abc " * 9], 260).save(tmp_path / "out")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    before = contents(tmp_path)
    run = run_limited(limit, "tokenizer", "--train", tmp_path / "text.txt", "--vocab", "290", "--out", tmp_path / "out")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert "could not be written (File too large); free disk space" in run.stderr
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_generate_for_a_file_of_prompts(model: Path, tmp_path: Path) -> None:
    prompts = ("the cat", "the mat", "sat on", "the")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    out = tmp_path / "out.jsonl"
    command = ("generate", model, "--input", tmp_path / "in.jsonl", "--output", out, "--max-tokens", "4")
    run = run_limited(200, *command, "--temperature", "0")
    lines = run.stderr.splitlines()
    assert run.returncode == 1, run.stderr
    assert f"{out}: could not be written (File too large); free disk space and run the same command again" in lines[-1]
    assert "Traceback" not in run.stderr
    done = out.read_bytes().count(b"\n")
    assert 0 < done < 4
    assert run_limited(10**6, *command, "--temperature", "0").returncode == 0
    assert out.read_bytes().count(b"\n") == 4
