"""Crash safety, counted: killed training runs, killed saves, damaged checkpoints: `python benchmarks/kills.py`.

kills-one      kill -9 at random steps of a run of 200 on one process, resumed each time: loss series and the sum of the
               final weights equal those of the uninterrupted run
kills-two      the same on two ranks
kills-saving   kill -9 while saving: the newest checkpoint or the one before loads
flips, cuts    a flipped bit or a truncation of any file of a checkpoint is detected, and the file named

`ours` counts successes, `peer` tries.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Row, arguments, report, row
from oneblock.errors import OneblockError
from oneblock.store import manifest
from oneblock.train.checkpoint import newest

SIZES = ["--dim", "16", "--n-layers", "1", "--n-heads", "2", "--context", "16", "--batch-size", "4"]
SIZES += ["--dtype", "float32"]
RUN = [*SIZES, "--steps", "200", "--log-every", "1", "--eval-every", "0", "--save-every", "9", "--dropout", "0.1"]
RUN += ["--no-tensorboard", "--sample-tokens", "4", "--compile", "off"]

SAVING = """
import sys, itertools
from pathlib import Path
from oneblock.model import Decoder, init_weights
from oneblock.spec import get_spec
from oneblock.text.train import byte_level
from oneblock.train.checkpoint import Saver
from oneblock.train.loop import start
from oneblock.train.options import Optimizer
model = Decoder(get_spec("llama", vocab=256, dim=64, n_layers=4, n_heads=2, context=16))
init_weights(model, 0)
state, saver = start(model, Optimizer()), Saver(Path(sys.argv[1]), byte_level(), "text", 2, background=True)
for state.step in itertools.count(int(sys.argv[2])):
    saver.save(state)
    saver.wait()
    print(state.step, flush=True)
"""


def start_ranks(argv: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    shared = {**os.environ, **shared} | ({"WORLD_SIZE": str(ranks)} if ranks > 1 else {})
    command = [sys.executable, "-m", "oneblock", "train", *argv]
    quiet = subprocess.DEVNULL
    numbered = [{**shared, "RANK": str(rank)} if ranks > 1 else shared for rank in range(ranks)]
    return [subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet) for env in numbered]


def steps_of(run: Path) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def series(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in rows if "loss" in r]


def run_to_end(argv: list[str], ranks: int) -> None:
    for process in start_ranks(argv, ranks):
        if process.wait():
            raise SystemExit(f"an uninterrupted run failed: {argv}")


def final_checksums(run: Path) -> list[object]:
    """Checksums of the files of the final weights."""
    return [entry for name, entry in manifest.read(run / "latest")["files"].items() if name.startswith("model")]


def killed_runs(count: int, ranks: int, folder: Path, draw: random.Random) -> int:
    """Count runs that, killed once at a random step and resumed, equal the uninterrupted run."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}.\n" for i in range(400)))
    reference, right = folder / f"reference{ranks}", 0
    run_to_end(["--data", str(text), "--out", str(reference), *RUN], ranks)
    for i in range(count):
        run, at = folder / f"run{ranks}-{i}", draw.randrange(10, 199)
        processes = start_ranks(["--data", str(text), "--out", str(run), *RUN], ranks)
        while steps_of(run) < at and processes[0].poll() is None:
            time.sleep(0.002)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        run_to_end(["--resume", str(run)], ranks)
        right += series(run) == series(reference) and final_checksums(run) == final_checksums(reference)
        shutil.rmtree(run)
    return right


def killed_saves(count: int, folder: Path, draw: random.Random) -> int:
    run, step, right = folder / "saves", 1, 0
    for _ in range(count):
        argv = [sys.executable, "-c", SAVING, str(run), str(step)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            assert process.stdout is not None
            step = int(process.stdout.readline())
            time.sleep(0.1 * draw.random())
            process.send_signal(signal.SIGKILL)
            step = max([step, *map(int, process.stdout)])
        try:
            loaded = int(newest(run).name[5:])
        except OneblockError:
            continue
        right += loaded >= step  # the last one reported as saved, or a newer one
        step = loaded + 1
    return right


def damaged(count: int, folder: Path, cut: bool, draw: random.Random) -> int:
    checkpoint, right = newest(folder / "saves"), 0
    files = sorted(path for path in checkpoint.iterdir())
    for _ in range(count):
        path = draw.choice(files)
        before = path.read_bytes()
        content = bytearray(before)
        at = draw.randrange(len(content))
        if cut:
            del content[at:]
        else:
            content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            manifest.verify(checkpoint)
        except OneblockError as e:
            right += path.name in str(e)
        path.write_bytes(before)
    return right


def main() -> int:
    parser = arguments(__doc__ or "", pairs=1)
    parser.add_argument("--share", type=float, default=1.0, help="share of the tries")
    args = parser.parse_args()
    draw = random.Random(0)

    def tries(n: int) -> int:
        return max(1, round(n * args.share))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts: list[tuple[str, int, int]] = []
        for title, n, count in (
            ("kills-saving", tries(200), lambda n: killed_saves(n, folder, draw)),
            ("flips", tries(500), lambda n: damaged(n, folder, False, draw)),
            ("cuts", tries(500), lambda n: damaged(n, folder, True, draw)),
            ("kills-one", tries(25), lambda n: killed_runs(n, 1, folder, draw)),
            ("kills-two", tries(10), lambda n: killed_runs(n, 2, folder, draw)),
        ):
            counts.append((title, count(n), n))
            print(*counts[-1], file=sys.stderr, flush=True)
    rows: list[Row] = [row(title, right, n, "right") for title, right, n in counts]
    report(rows, args, "kills")
    return int(any(right < n for _, right, n in counts))


if __name__ == "__main__":
    sys.exit(main())
