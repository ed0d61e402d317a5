"""Paired measurements, rows, the record of the machine, `--json` and `--save`: shared by every benchmark.

Memory bandwidth of a shared machine changes twofold within a minute, so that two long runs one after the other compare
two moments. Here both sides take turns of one to two seconds and every pair of turns gives one ratio; reported is the
median of the paired ratios with its 95% interval. Pairs are added until the interval lies within 0.02 of the median, or
100 pairs are reached. Whole runs that take longer (start-up, training to a loss) alternate in at least 5 pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 1.5  # seconds that one turn aims at
TOLERANCE, MAX_PAIRS = 0.02, 100


@dataclass(frozen=True)
class Sample:
    """One turn of one side: its figure (a rate, seconds or bytes) and the CPU-seconds it used."""

    value: float
    cpu: float


def arguments(description: str, pairs: int = 20) -> argparse.ArgumentParser:
    """`--json`, `--save`, `--pairs`, `--threads` and `--against`; a script adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--save", action="store_true", help="write the rows and the machine to benchmarks/results")
    parser.add_argument("--pairs", type=int, default=pairs, help=f"least number of pairs (default {pairs})")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's own choice)")
    parser.add_argument("--against", type=Path, help="a checkout of another commit, whose side replaces the peers")
    parser.add_argument("--side", help="run as one side of a pair: used by the script itself")
    return parser


# ------------------------------------------------------------------ turns


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_sample(run: Callable[[], float]) -> Sample:
    """A turn of this process and its finished children."""
    before = cpu_seconds()
    value = run()
    return Sample(value, cpu_seconds() - before)


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Worker:
    """A process of the running script that waits for its turn, so that neither side disturbs the other's memory."""

    def __init__(self, flags: Sequence[str], checkout: Path | None = None):
        script = Path(sys.argv[0]).resolve()
        env = dict(os.environ)
        if checkout is not None:
            script = checkout.resolve() / "benchmarks" / script.name
            env["PYTHONPATH"] = str(checkout.resolve() / "src")
        log = None if os.environ.get("DEBUG") else subprocess.DEVNULL
        argv = [sys.executable, str(script), *flags]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
        )

    def ask(self, *args: Any) -> Sample:
        """One turn: the arguments of the function that the process serves."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(args) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a side of the benchmark ended ({self.process.wait()}); DEBUG=1 shows its errors")
        return Sample(*json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(run: Callable[..., float]) -> None:
    """The loop of a worker process: a line of arguments in, a line with value and CPU-seconds out."""
    for line in sys.stdin:
        args = json.loads(line)
        sample = take_sample(lambda args=args: run(*args))
        print(json.dumps((sample.value, sample.cpu)), flush=True)


# ------------------------------------------------------------------ pairs


@dataclass
class Pairs:
    """Paired turns of two sides."""

    ours: list[Sample] = field(default_factory=list)
    peer: list[Sample] = field(default_factory=list)

    def ratios(self) -> list[float]:
        return [a.value / b.value for a, b in zip(self.ours, self.peer, strict=True)]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its distribution-free 95% interval, from the binomial distribution of ranks.

    Fewer than six values allow no such interval: their range is given.
    """
    ranked, n = sorted(values), len(values)
    tail, rank = 0.0, 0
    while rank < n // 2 and tail + math.comb(n, rank) / 2**n <= 0.025:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    low = max(rank - 1, 0)
    return statistics.median(ranked), ranked[low], ranked[n - 1 - low]


def measure_pairs(
    ours: Callable[[], Sample],
    peer: Callable[[], Sample],
    pairs: int = 20,
    most: int = MAX_PAIRS,
    warmup: int = 1,
) -> Pairs:
    """Alternate both sides (ours peer, peer ours, ..) until the interval is narrow or `most` pairs are reached."""
    for _ in range(warmup):
        ours(), peer()
    taken = Pairs()
    while len(taken.ours) < max(pairs, 1) or (len(taken.ours) < most and not is_narrow(taken.ratios())):
        order = ("ours", "peer") if len(taken.ours) % 2 == 0 else ("peer", "ours")
        samples = {side: (ours if side == "ours" else peer)() for side in order}
        taken.ours.append(samples["ours"])
        taken.peer.append(samples["peer"])
    return taken


def is_narrow(ratios: Sequence[float]) -> bool:
    middle, low, high = median_interval(ratios)
    return max(high - middle, middle - low) <= TOLERANCE


def pair_row(name: str, pairs: Pairs, unit: str, lower_is_better: bool = False) -> Row:
    """`name` is `what/peer`; a ratio above 1 means that ours is better."""
    ratios = [1 / x for x in pairs.ratios()] if lower_is_better else pairs.ratios()
    middle, low, high = median_interval(ratios)
    values = {side: statistics.median(sample.value for sample in getattr(pairs, side)) for side in ("ours", "peer")}
    cpu = {f"{side}_cpu": round_figures(statistics.median(t.cpu for t in getattr(pairs, side))) for side in values}
    return {
        "name": name,
        **{side: round_figures(value) for side, value in values.items()},
        "unit": unit,
        "ratio": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "pairs": len(ratios),
        **cpu,
    }


def row(name: str, ours: float, peer: float, unit: str, lower_is_better: bool = False) -> Row:
    """A row of one measurement a side, for what does not vary: bytes, losses, counts."""
    ratio = peer / ours if lower_is_better else ours / peer
    return {
        "name": name,
        "ours": round_figures(ours),
        "peer": round_figures(peer),
        "unit": unit,
        "ratio": round(ratio, 3),
    }


def round_figures(x: float) -> float:
    return float(f"{x:.4g}")


# ------------------------------------------------------------------ the record


def machine() -> dict[str, Any]:
    """Processor, cores and versions: a figure means nothing without them."""
    record: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()}
    record["python"] = platform.python_version()
    for package in ("torch", "transformers", "tokenizers", "llama-cpp-python"):
        try:
            record[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in record:
        import torch

        record["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            record["gpu"] = torch.cuda.get_device_name()
    return record


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    if "model name" not in info:
        return platform.machine()
    generation = f" (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else ""
    return info["model name"] + generation  # a virtual machine's name does not tell the generation


def report(rows: list[Row], args: argparse.Namespace, name: str) -> None:
    """Print the rows; with `--save` write results/NAME.json with the machine and the date."""
    if args.save:
        record = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for r in rows:
        interval = f" ({r['low']:.2f} .. {r['high']:.2f}, {r['pairs']} pairs)" if "pairs" in r else ""
        print(
            f"{r['name']:<34} ours {r['ours']:>10} peer {r['peer']:>10} {r['unit']:<9} ratio {r['ratio']:.2f}{interval}"
        )
