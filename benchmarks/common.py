"""What every benchmark shares: alternating timing, rows, the record of the machine, `--json` and `--save`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def arguments(description: str, repeats: int = 5) -> argparse.ArgumentParser:
    """`--json`, `--save`, `--repeats` and `--threads`; a script adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--save", action="store_true", help="write the rows and the machine to benchmarks/results")
    parser.add_argument("--repeats", type=int, default=repeats, help="alternating runs of each side; medians are kept")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own choice)")
    return parser


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], float], peer: Callable[[], float], repeats: int = 5, warmup: int = 1
) -> tuple[float, float]:
    """Medians of what both return, run in turns (ours peer, peer ours, ..): a noisy machine treats them alike."""
    for _ in range(warmup):
        ours()
        peer()
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            found[side].append((ours, peer)[side]())
    return statistics.median(found[0]), statistics.median(found[1])


class Side:
    """A process of the running script that times something whenever it is asked."""

    def __init__(self, flags: list[str]):
        argv, log = [sys.executable, sys.argv[0], *flags], None if os.environ.get("DEBUG") else subprocess.DEVNULL
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def ask(self, *what: Any) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def answer(run: Callable[..., float]) -> None:
    """What such a process does: a line in, a line out."""
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)


def row(name: str, ours: float, peer: float, unit: str, lower_is_better: bool = False) -> Row:
    """`name` is `what/peer`; a ratio above 1 means ours is better."""
    ratio = peer / ours if lower_is_better else ours / peer
    return {"name": name, "ours": rounded(ours), "peer": rounded(peer), "unit": unit, "ratio": round(ratio, 3)}


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def machine() -> dict[str, Any]:
    """Where a figure was measured: without it, it means nothing."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()}
    found["python"] = platform.python_version()
    for package in ("torch", "transformers", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        import torch

        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    if "model name" not in found:
        return platform.machine()
    generation = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return found["model name"] + generation  # the name of a virtual machine's does not tell the generation


def report(rows: list[Row], args: argparse.Namespace, name: str) -> None:
    """Print the rows, and with `--save` keep them in results/NAME.json with the machine and the date."""
    if args.save:
        found = {"date": time.strftime("%Y-%m-%d"), "repeats": args.repeats, "machine": machine(), "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for r in rows:
        print(f"{r['name']:<34} ours {r['ours']:>10} peer {r['peer']:>10} {r['unit']:<9} ratio {r['ratio']:.2f}")
