"""Loading, prefill and decode of a 100M-parameter Llama beside transformers: `python benchmarks/generate.py`.

Random weights, made in a temporary folder; each side loads that folder in a process of its own. `--against CHECKOUT`
compares with another commit instead: rows named `previous`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import SAMPLE_SECONDS, Row, Worker, arguments, measure_pairs, pair_row, report, seconds, serve

PROMPT, SHORT_PROMPT = 512, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Generate = Callable[[torch.Tensor, int], object]  # ids (B, T), new tokens


def make_folder(folder: Path, dtype: torch.dtype) -> None:
    """12 layers of 768, 12 query and 4 KV heads, vocabulary 32,000: 108M parameters."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def our_side(folder: Path) -> tuple[Callable[[], torch.nn.Module], Callable[[], Generate]]:
    """Loading, and generating with what was loaded."""
    import oneblock

    def generator() -> Generate:
        llm = oneblock.load(folder)
        return lambda ids, n: llm.generate(ids.tolist(), max_tokens=n, temperature=0, ignore_eos=True)

    return lambda: oneblock.load(folder).model, generator


def transformers_side(folder: Path) -> tuple[Callable[[], torch.nn.Module], Callable[[], Generate]]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def generator() -> Generate:
        model = load()
        options = {"do_sample": False, "pad_token_id": 0}
        return lambda ids, n: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, **options
        )

    return load, generator


def read_pages(model: torch.nn.Module) -> None:
    """Read every page of the weights: a loader that maps the file has not read it yet."""
    for p in model.parameters():
        p.view(-1).view(torch.uint8)[::4096].sum()


def sampler(load: Callable[[], torch.nn.Module], generator: Callable[[], Generate]) -> Callable[[str, int], float]:
    """One turn: seconds to load; prompts prefilled a second; or decode steps a second."""
    generate: list[Generate] = []
    tokens: dict[int, int] = {}

    def decode(rows: int, n: int) -> float:
        ids = torch.randint(0, 32_000, (rows, SHORT_PROMPT), generator=torch.Generator().manual_seed(0))
        return (n - 1) / (seconds(lambda: generate[0](ids, n)) - seconds(lambda: generate[0](ids, 1)))

    def run_turn(what: str, rows: int) -> float:
        if what == "load":
            return seconds(lambda: read_pages(load()))
        if not generate:
            generate.append(generator())
        if what == "prefill":
            ids = torch.randint(0, 32_000, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
            return 1 / seconds(lambda: generate[0](ids, 1))
        if rows not in tokens:
            decode(rows, 128)
            tokens[rows] = max(16, min(256, round(decode(rows, 32) * SAMPLE_SECONDS)))
        return decode(rows, tokens[rows])

    return run_turn


def measure(folder: Path, name: str, args: Namespace) -> list[Row]:
    flags = ["--threads", str(args.threads), "--path", str(folder)]
    ours = Worker([*flags, "--side", "ours"])
    peer = Worker([*flags, "--side", "ours" if args.against else "transformers"], args.against)
    against, rows = "previous" if args.against else "transformers", []
    cases = [("load", 1), *((what, batch) for batch in args.batches for what in ("prefill", "decode"))]
    for what, batch in cases:
        pairs = measure_pairs(lambda: ours.ask(what, batch), lambda: peer.ask(what, batch), args.pairs)  # noqa: B023
        if what == "load":
            rows.append(pair_row(f"load-{name}/{against}", pairs, "s", lower_is_better=True))
        else:
            unit = "prompts/s" if what == "prefill" else "steps/s"
            rows.append(pair_row(f"{what}-b{batch}-{name}/{against}", pairs, unit))
        print(rows[-1], file=sys.stderr)
    ours.close()
    peer.close()
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--path", type=Path, help="the model of --side: used by the script itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.side:
        serve(sampler(*(our_side if args.side == "ours" else transformers_side)(args.path)))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.dtypes:
            folder = Path(temporary) / name
            make_folder(folder, DTYPES[name])
            rows += measure(folder, name, args)
    report(rows, args, "generate")


if __name__ == "__main__":
    main()
