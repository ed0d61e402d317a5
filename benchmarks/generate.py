"""Loading, prefill and decode of a 100M-parameter Llama beside transformers: `python benchmarks/generate.py`.

Random weights, made in a temporary folder; both sides load that folder and run in turns in this one process.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers

import oneblock
from common import Row, alternate, arguments, report, row, seconds
from oneblock.infer.llm import LLM

PROMPT, NEW = 512, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_folder(folder: Path, dtype: torch.dtype) -> None:
    """12 layers of 768, 12 heads of which 4 hold keys and values, vocabulary 32,000: 108M parameters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def load_ours(folder: Path) -> LLM:
    return oneblock.load(folder)


def load_peer(folder: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()


def touched(model: torch.nn.Module) -> None:
    """Read every weight once: a loader that only maps the file has not loaded it yet."""
    for p in model.parameters():
        p.view(-1).view(torch.uint8)[::4096].sum()


def load_rows(folder: Path, name: str, repeats: int) -> Iterator[Row]:
    times = alternate(
        lambda: seconds(lambda: touched(load_ours(folder).model)),
        lambda: seconds(lambda: touched(load_peer(folder))),
        repeats,
    )
    yield row(f"load-{name}/transformers", *times, "s", lower_is_better=True)


def ours_run(llm: LLM, ids: torch.Tensor) -> Callable[[int], float]:
    prompts = ids.tolist()

    def run(n: int) -> float:
        return seconds(lambda: llm.generate(prompts, max_tokens=n, temperature=0, ignore_eos=True))

    return run


def peer_run(model: transformers.LlamaForCausalLM, ids: torch.Tensor) -> Callable[[int], float]:
    mask = torch.ones_like(ids)

    def run(n: int) -> float:
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        return seconds(lambda: model.generate(ids, attention_mask=mask, **settings))

    return run


def speed_rows(folder: Path, name: str, batches: list[int], repeats: int) -> Iterator[Row]:
    llm, model = load_ours(folder), load_peer(folder)
    for batch in batches:
        long, short = (torch.randint(0, 32_000, (batch, n)) for n in (PROMPT, 16))
        prefill = partial(prefill_speed, ours_run(llm, long)), partial(prefill_speed, peer_run(model, long))
        yield row(f"prefill-b{batch}-{name}/transformers", *alternate(*prefill, repeats), "prompts/s")
        decode = partial(decode_speed, ours_run(llm, short)), partial(decode_speed, peer_run(model, short))
        yield row(f"decode-b{batch}-{name}/transformers", *alternate(*decode, repeats), "steps/s")


def prefill_speed(run: Callable[[int], float]) -> float:
    """Batches of prompts a second, up to their first token."""
    return 1 / run(1)


def decode_speed(run: Callable[[int], float]) -> float:
    """Steps a second, each a token for every row: a run of NEW tokens less its first."""
    return (NEW - 1) / (run(NEW) - run(1))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    args: argparse.Namespace = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.dtypes:
            folder = Path(temporary) / name
            make_folder(folder, DTYPES[name])
            rows += load_rows(folder, name, args.repeats)
            rows += speed_rows(folder, name, args.batches, args.repeats)
            gc.collect()
    report(rows, args, "generate")


if __name__ == "__main__":
    main()
