"""Products of few rows with large matrices beside torch's: `python benchmarks/products.py`.

FORM-ROWS/linear: an (8192 x 2048) matrix in bf16, 8 bits or 4 bits (groups of 64) times so many rows, as decoding has
them: `ours` beside torch's product of the same matrix in bf16, in products a second. FORM-ROWS/memory: GB/s of weights,
scales included, that ours reads, beside a plain sum of memory. Many matrices are gone through, so that none stays in
the caches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common import Row, alternate, arguments, report, row, seconds
from oneblock.kernels.linear import SkinnyGemmLinear
from oneblock.kernels.substitution import as_subclass
from oneblock.quant.linear import QuantizedLinear
from oneblock.quant.quantize import round_to_nearest

OUT, IN, MATRICES = 8192, 2048, 12
ROWS = (1, 4, 8, 16, 32)
GROUPS = {"bf16": None, "int8": 0, "int4": 64}


def layers(weights: list[torch.Tensor], group: int | None) -> list[torch.nn.Module]:
    found: list[torch.nn.Module] = []
    for weight in weights:
        plain = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
        plain.weight = torch.nn.Parameter(weight)
        if group is None:
            found.append(as_subclass(plain, SkinnyGemmLinear))
            continue
        quantized = QuantizedLinear(OUT, IN, group)
        round_to_nearest("", quantized, weight)
        found.append(quantized)
    return found


def rate(run: Callable[[], object], count: int) -> Callable[[], float]:
    return lambda: count / seconds(run)


def main() -> None:
    args = arguments(__doc__ or "", repeats=7).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weights = [torch.randn(OUT, IN).bfloat16() for _ in range(MATRICES)]
    memory = torch.ones(1 << 26, dtype=torch.int64)
    rows: list[Row] = []
    with torch.inference_mode():
        for form, group in GROUPS.items():
            made = layers(weights, group)
            size = sum(x.nbytes for x in (*made[0].parameters(), *made[0].buffers()))
            for count in ROWS:
                x = torch.randn(count, IN).bfloat16()
                ours = rate(lambda made=made, x=x: [layer(x) for layer in made], MATRICES)  # pyright: ignore
                torchs = rate(lambda x=x: [F.linear(x, weight) for weight in weights], MATRICES)
                mine, theirs = alternate(ours, torchs, args.repeats)
                rows.append(row(f"{form}-{count}/linear", mine, theirs, "products/s"))
                mine, read = alternate(ours, lambda: memory.nbytes / seconds(memory.sum), args.repeats)
                rows.append(row(f"{form}-{count}/memory", mine * size / 1e9, read / 1e9, "GB/s"))
    report(rows, args, "products")


if __name__ == "__main__":
    main()
