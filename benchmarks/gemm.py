"""Small-batch GEMM beside torch's: `python benchmarks/gemm.py`.

WEIGHTS-ROWS/linear: a linear layer of (8192 x 2048) weights in bf16, int8 or int4 (groups of 64) on so many rows, as
decoding has them, beside torch's bf16 linear layer, in layers per second. WEIGHTS-ROWS/memory: GB/s of weights, scales
included, beside a sequential read of memory. Several layers take turns, so that none stays in the processor's caches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common import Row, Sample, arguments, measure_pairs, pair_row, report, seconds, take_sample
from oneblock.kernels.linear import SkinnyGemmLinear
from oneblock.kernels.substitution import as_subclass
from oneblock.quant.linear import QuantizedLinear
from oneblock.quant.quantize import round_to_nearest

OUT, IN, MATRICES = 8192, 2048, 12
ROWS = (1, 4, 8, 16, 32)
GROUPS = {"bf16": None, "int8": 0, "int4": 64}


def build_layers(weights: list[torch.Tensor], group: int | None) -> list[torch.nn.Module]:
    layers: list[torch.nn.Module] = []
    for weight in weights:
        plain = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
        plain.weight = torch.nn.Parameter(weight)
        if group is None:
            layers.append(as_subclass(plain, SkinnyGemmLinear))
            continue
        quantized = QuantizedLinear(OUT, IN, group)
        round_to_nearest("", quantized, weight)
        layers.append(quantized)
    return layers


def rate(run: Callable[[], object], count: int, repeats: int = 50) -> Callable[[], Sample]:
    """A sample of how often per second `run`, which counts for `count`, is done."""
    return lambda: take_sample(lambda: count * repeats / seconds(lambda: [run() for _ in range(repeats)]))


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weights = [torch.randn(OUT, IN).bfloat16() for _ in range(MATRICES)]
    memory = torch.ones(1 << 26, dtype=torch.int64)
    rows: list[Row] = []
    with torch.inference_mode():
        for name, group in GROUPS.items():
            layers = build_layers(weights, group)
            size = sum(x.nbytes for x in (*layers[0].parameters(), *layers[0].buffers()))
            for count in ROWS:
                x = torch.randn(count, IN).bfloat16()
                ours = rate(lambda layers=layers, x=x: [layer(x) for layer in layers], MATRICES)
                peer = rate(lambda x=x: [F.linear(x, weight) for weight in weights], MATRICES)
                rows.append(pair_row(f"{name}-{count}/linear", measure_pairs(ours, peer, args.pairs), "layers/s"))
                read = rate(memory.sum, 1)
                pairs = measure_pairs(ours, read, args.pairs)
                pairs.ours = [Sample(sample.value * size / 1e9, sample.cpu) for sample in pairs.ours]
                pairs.peer = [Sample(sample.value * memory.nbytes / 1e9, sample.cpu) for sample in pairs.peer]
                rows.append(pair_row(f"{name}-{count}/memory", pairs, "GB/s"))
                print(rows[-2], rows[-1], file=sys.stderr)
    report(rows, args, "gemm")


if __name__ == "__main__":
    main()
