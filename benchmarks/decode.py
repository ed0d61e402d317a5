"""Decode and prefill speed beside transformers and llama.cpp: `python benchmarks/decode.py`.

Random weights, greedy, 128 prompt tokens. Each side is a process of its own; both take turns of about 1.5 seconds.
llama.cpp's side needs `pip install llama-cpp-python` (extra `bench`).

100m: 12 layers of 768, 12 query and 4 KV heads, vocabulary 32,000; 1b: the shape of Llama 3.2 1B.
int8 and int4 (groups of 64) are written as by `oneblock quantize`, and compared with llama.cpp's q8_0 and q4_0. Rows
named bf16 compare them with transformers in bf16. `read-bandwidth` is weights read per second beside a sequential read
of memory. `--against CHECKOUT` compares with another commit instead: rows named `previous`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import SAMPLE_SECONDS, Row, Worker, arguments, measure_pairs, pair_row, report, seconds, serve

PROMPT, LONG_PROMPT, MOST_TOKENS = 128, 512, 256
SHAPES: dict[str, dict[str, int]] = {
    "100m": {"vocab": 32_000, "dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4, "hidden_dim": 2048},
    "1b": {},
}
GGUF_TYPES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
# name: model, weights, sequences at a time, what is timed
CASES = {
    "100m-bf16": ("100m", "bf16", 1, "decode"),
    "1b-bf16": ("1b", "bf16", 1, "decode"),
    "1b-int8": ("1b", "int8", 1, "decode"),
    "1b-int4": ("1b", "int4", 1, "decode"),
    "1b-prefill512": ("1b", "bf16", 1, "prefill"),
    "100m-batch8": ("100m", "bf16", 8, "decode"),
}
Generate = Callable[[list[list[int]], int], list[float]]  # prompts, new tokens -> the time of each new token


# ------------------------------------------------------------------ the models


def make_models(folder: Path, name: str, llama: bool) -> None:
    """A folder for transformers and us, quantized folders, and a GGUF file for each of llama.cpp's cases."""
    import oneblock
    from oneblock.quant.quantize import QuantConfig, quantize
    from oneblock.spec import get_spec
    from oneblock.store import save_model
    from oneblock.store.gguf import save_gguf
    from oneblock.store.load import build_on_meta
    from oneblock.store.quantized import write_quantized
    from oneblock.text.train import train_bpe

    torch.manual_seed(0)
    shape = SHAPES[name]
    spec = get_spec("llama", **shape, context=2048, tied=False) if shape else get_spec("llama-3.2-1b")
    model = build_on_meta(spec).to(torch.bfloat16).to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02) if p.dim() > 1 else p.data.fill_(1.0)
    model.tie()
    save_model(folder / f"{name}-bf16", model)
    tokenizer = train_bpe(["a few words, and a few more words"], 300)
    weights = {case[1] for case in CASES.values() if case[0] == name}
    for kind in weights if llama else ():
        save_gguf(folder / f"{name}-{kind}.gguf", model, tokenizer, GGUF_TYPES[kind])
    for config in (QuantConfig(8), QuantConfig(4, 64)) if name == "1b" else ():
        quantized = folder / f"{name}-int{config.bits}"
        quantized.mkdir()
        write_quantized(quantized, quantize(oneblock.load(folder / f"{name}-bf16").model, config), config)


# ------------------------------------------------------------------ the sides


def our_side(folder: Path, compile: str) -> Generate:
    """Generation as `oneblock generate` does it; a batch gives only its first and last time."""
    import oneblock
    from oneblock.kernels.huge_pages import MAX_HEAP_ALLOCATION, reuse_memory

    reuse_memory(MAX_HEAP_ALLOCATION)
    llm = oneblock.load(folder)
    llm.compile = compile  # type: ignore[assignment]

    def generate(prompts: list[list[int]], n: int) -> list[float]:
        options: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
        if len(prompts) == 1:
            return [time.perf_counter() for _ in llm.stream_ids(prompts[0], max_tokens=n, **options)]
        first = seconds(lambda: llm.generate(prompts, max_tokens=1, **options))
        start = time.perf_counter()
        llm.generate(prompts, max_tokens=n, **options)
        return [start + first, *([time.perf_counter()] * (n - 1))]

    return generate


def transformers_side(folder: Path) -> Generate:
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def generate(prompts: list[list[int]], n: int) -> list[float]:
        ids, times = torch.tensor(prompts), []

        def note(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[note], **options)
        return times

    return generate


def llama_side(path: Path, threads: int, rows: int) -> Generate:
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 1024 * rows, 2048, 512, rows
    params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(2048, 0, rows)

    def forward(tokens: list[list[int]], start: int) -> list[int]:
        """One pass over some tokens of each sequence; the likeliest next token of each."""
        batch.n_tokens = sum(map(len, tokens))
        i, last = 0, []
        for sequence, ids in enumerate(tokens):
            for j, id in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = id, start + j, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, j == len(ids) - 1
                i += 1
            last.append(i - 1)
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = (llama_cpp.llama_get_logits_ith(context, index) for index in last)
        return [int(np.ctypeslib.as_array(x, shape=(vocab,)).argmax()) for x in logits]

    def generate(prompts: list[list[int]], n: int) -> list[float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        chosen, times = forward(prompts, 0), [time.perf_counter()]
        for step in range(1, n):
            chosen = forward([[id] for id in chosen], len(prompts[0]) + step - 1)
            times.append(time.perf_counter())
        return times

    return generate


def sampler(generate: Generate) -> Callable[[str, int], float]:
    """Tokens per second of one turn; the first use warms up, and sets how many tokens a turn decodes."""
    tokens: dict[tuple[str, int], int] = {}

    def sample(what: str, rows: int) -> float:
        length = LONG_PROMPT if what == "prefill" else PROMPT
        prompts = torch.randint(1, 30_000, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
        if what == "prefill":
            return rows * length / seconds(lambda: generate(prompts, 1))
        if (what, rows) not in tokens:
            generate(prompts, MOST_TOKENS)  # long enough for every one-time cost
            times = generate(prompts, 16)
            rate = (len(times) - 1) / (times[-1] - times[0])
            tokens[what, rows] = max(8, min(MOST_TOKENS, round(rate * SAMPLE_SECONDS)))
        times = generate(prompts, tokens[what, rows])
        return rows * (len(times) - 1) / (times[-1] - times[0])

    return sample


def read_bandwidth() -> float:
    """Bytes per second of a sequential read of 1 GB."""
    block = torch.ones(1 << 27, dtype=torch.int64)
    return block.nbytes / min(seconds(block.sum) for _ in range(5))


def run_side(side: str, args: Any) -> None:
    if side == "read":
        serve(lambda what, rows: read_bandwidth())
    elif side == "llama.cpp":
        serve(sampler(llama_side(args.path, args.threads, args.rows)))
    else:
        serve(sampler(our_side(args.path, args.compile) if side == "ours" else transformers_side(args.path)))


# ------------------------------------------------------------------ pairs


def measure(name: str, folder: Path, args: Any, llama: bool) -> list[Row]:
    model, weights, rows, what = CASES[name]
    own, plain = folder / f"{model}-{weights}", folder / f"{model}-bf16"
    paths = {"transformers": plain, **({"llama.cpp": folder / f"{model}-{weights}.gguf"} if llama else {})}
    if args.against:
        paths = {"ours": previous_models(folder, model, args.against) / own.name}
    elif what == "decode" and rows == 1 and model == "1b":
        paths["read"] = plain
    flags = ["--compile", args.compile, "--threads", str(args.threads), "--rows", str(rows)]

    def start(side: str, path: Path, checkout: Path | None = None) -> Worker:
        return Worker([*flags, "--side", side, "--path", str(path)], checkout)

    ours, results = start("ours", own), []
    for side, path in paths.items():
        peer = start(side, path, args.against)
        pairs = measure_pairs(lambda: ours.ask(what, rows), lambda peer=peer: peer.ask(what, rows), args.pairs)
        peer.close()
        results.append(side_row(name, side, pairs, own, bool(args.against)))
        print(results[-1], file=sys.stderr)
    ours.close()
    return results


def previous_models(folder: Path, model: str, checkout: Path) -> Path:
    """The models as the other checkout writes them: formats of quantized folders may differ."""
    previous = folder / "previous"
    if not (previous / f"{model}-bf16").exists():
        script = checkout.resolve() / "benchmarks" / "decode.py"
        env = os.environ | {"PYTHONPATH": str(checkout.resolve() / "src")}
        argv = [sys.executable, str(script), "--make", model, "--folder", str(previous)]
        subprocess.run(argv, check=True, env=env)
    return previous


def side_row(name: str, side: str, pairs: Any, folder: Path, against: bool) -> Row:
    if side == "read":  # bytes per second instead of tokens
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for samples, scale in ((pairs.ours, size / 1e9), (pairs.peer, 1e-9)):
            samples[:] = [type(sample)(sample.value * scale, sample.cpu) for sample in samples]
        return pair_row(f"{name}/read-bandwidth", pairs, "GB/s")
    peer = "previous" if against else "bf16" if side == "transformers" and "int" in name else side
    return pair_row(f"{name}/{peer}", pairs, "tokens/s")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="on", help="compiled decode steps of ours")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, help="keep the models here, and use those that are here")
    parser.add_argument("--path", type=Path, help="the model of --side: used by the script itself")
    parser.add_argument("--rows", type=int, default=1, help="sequences of --side: used by the script itself")
    parser.add_argument("--make", choices=SHAPES, help="only write one model's folders into --folder")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.side:
        run_side(args.side, args)
        return
    if args.make:
        make_models(args.folder, args.make, llama=False)
        return
    llama = find_spec("llama_cpp") is not None
    if not llama and not args.against:
        print("llama.cpp is left out: pip install llama-cpp-python", file=sys.stderr)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for model in SHAPES:
            cases = [name for name in args.cases if CASES[name][0] == model]
            if cases and not (folder / f"{model}-bf16").exists():
                make_models(folder, model, llama)
            for name in cases:
                rows += measure(name, folder, args, llama)
    report(rows, args, "decode")


if __name__ == "__main__":
    main()
