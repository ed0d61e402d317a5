"""The examples, as far as they can be checked without their clusters."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from oneblock.flags import parse
from oneblock.train.options import Train

FOLDER = Path(__file__).parent.parent / "examples"


def commands(text: str) -> list[list[str]]:
    """What follows `-m oneblock train` in a text, shell variables filled in."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"-m oneblock train ([^\n]*)", joined)]


def test_the_lines_of_the_readme_are_flags_that_exist() -> None:
    found = commands((FOLDER / "README.md").read_text())
    assert len(found) == 2
    options = [parse(Train, argv, "oneblock train") for argv in found]
    assert options[0].loop.mesh == "fsdp=8"
    assert options[1].sizes.dim == 128


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script() -> None:
    done = subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (FOLDER / "slurm.sh").read_text()
    begin, resume = re.search(r"args=\((--data.*?)\)", text, re.S), re.search(r"args=\((--resume.*?)\)", text)
    assert begin and resume
    for found in (begin, resume):
        options = parse(Train, shlex.split(found[1].replace("$", "")), "oneblock train")
        assert options.loop.mesh == "dp=2 fsdp=8" or options.resume


def test_the_kubernetes_file() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    assert service["kind"] == "Service" and job["kind"] == "Job"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    script = pod["containers"][0]["args"][0]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    words = " ".join(re.findall(r'args="(?:\$args )?(.*)"', script))
    flags = re.findall(r"--[a-z-]+", words)
    known = {
        f"--{name}"
        for name in ("resume", "data", "model", "context", "batch-size", "steps", "save-every", "device", "out", "mesh")
    }
    assert set(flags) == known
