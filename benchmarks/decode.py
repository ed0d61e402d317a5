"""Decoding and prefill beside transformers and llama.cpp: `python benchmarks/decode.py`.

Random weights; greedy, 128 tokens in, 128 out. Each side is a process of its own that waits for its turn, in rounds, so
that a busy machine treats all alike; llama.cpp's sides need `pip install llama-cpp-python` (extra `bench`).

100m: 12 layers of 768, 12 heads of which 4 hold keys and values, vocabulary 32,000; 1b: Llama 3.2 1B's shape.
int8 and int4 are `oneblock quantize`'s 8 bits and 4 bits in groups of 64, against llama.cpp's q8_0 and q4_0. Rows named
bf16 compare them with transformers in bf16. `read-bandwidth` is weights read per second against a plain sum of memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import Row, Side, answer, arguments, report, row, seconds

IN, OUT, LONG = 128, 128, 512
SHAPES: dict[str, dict[str, int]] = {
    "100m": {"vocab": 32_000, "dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4, "hidden_dim": 2048},
    "1b": {},
}
FORMS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}  # ours, and llama.cpp's
# A case: the model, the bits, the texts at a time, and whether their prompts or what follows is timed
CASES = [
    ("100m-bf16", "100m", "bf16", 1, "decode"),
    ("1b-bf16", "1b", "bf16", 1, "decode"),
    ("1b-int8", "1b", "int8", 1, "decode"),
    ("1b-int4", "1b", "int4", 1, "decode"),
    ("1b-prefill512", "1b", "bf16", 1, "prefill"),
    ("100m-batch8", "100m", "bf16", 8, "decode"),
]

Run = Callable[[str, int], float]  # (decode or prefill, texts at a time) -> tokens a second


# ------------------------------------------------------------------ the models


def make(folder: Path, name: str, llama: bool) -> None:
    """A folder for transformers and us, one of each of our codes, and a file for each of llama.cpp's."""
    import oneblock
    from oneblock.quant.quantize import QuantConfig, quantize, write_quantized
    from oneblock.store import save_model
    from oneblock.store.gguf import save_gguf
    from oneblock.store.load import on_meta
    from oneblock.text.train import train_bpe

    torch.manual_seed(0)
    shape = SHAPES[name]
    spec = oneblock.get_spec("llama", **shape, context=2048, tied=False) if shape else oneblock.get_spec("llama-3.2-1b")
    model = on_meta(spec).to(torch.bfloat16).to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02) if p.dim() > 1 else p.data.fill_(1.0)
    model.tie()
    save_model(folder / f"{name}-bf16", model)
    words = train_bpe(["some words, and some more words"], 300)
    for form, kind in FORMS.items():
        if llama and (name, form) in {(case[1], case[2]) for case in CASES}:
            save_gguf(folder / f"{name}-{form}.gguf", model, words, kind)
    for bits in (QuantConfig(8), QuantConfig(4, 64)) if name == "1b" else ():
        coded = folder / f"{name}-int{bits.bits}"
        coded.mkdir()
        write_quantized(coded, quantize(oneblock.load(folder / f"{name}-bf16").model, bits), bits)


# ------------------------------------------------------------------ the sides


def ours(folder: Path, compile: str) -> Run:
    """As `oneblock generate` has it."""
    import oneblock
    from oneblock.kernels.heap import MOST, reuse_memory

    reuse_memory(MOST)
    llm = oneblock.load(folder)
    llm.compile = compile  # type: ignore[assignment]

    def once(prompts: list[list[int]], n: int) -> float:
        return seconds(lambda: llm.generate(prompts, max_tokens=n, temperature=0, ignore_eos=True))

    return timed(once)


def transformers_side(folder: Path) -> Run:
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def once(prompts: list[list[int]], n: int) -> float:
        ids = torch.tensor(prompts)
        how = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        return seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how))

    return timed(once)


def llama_side(path: Path, threads: int) -> Run:
    import llama_cpp

    rows = 8 if "100m" in path.name else 1
    llama_cpp.llama_backend_init()
    how = llama_cpp.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = 1024 * rows, 2048, 512, rows
    how.n_threads = how.n_threads_batch = threads or os.cpu_count() or 1
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, how)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(2048, 0, rows)

    def feed(tokens: list[list[int]], start: int) -> None:
        """One pass over some tokens of each text, with logits of the last."""
        batch.n_tokens = sum(map(len, tokens))
        i = 0
        for text, ids in enumerate(tokens):
            for j, id in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = id, start + j, 1
                batch.seq_id[i][0], batch.logits[i] = text, j == len(ids) - 1
                i += 1
        assert llama_cpp.llama_decode(context, batch) == 0

    def once(prompts: list[list[int]], n: int) -> float:
        def run() -> None:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            feed(prompts, 0)
            last = [sum(map(len, prompts[: i + 1])) - 1 for i in range(len(prompts))]
            for step in range(1, n):
                found = (llama_cpp.llama_get_logits_ith(context, i) for i in last)
                chosen = [int(largest(x, vocab)) for x in found]
                feed([[id] for id in chosen], len(prompts[0]) + step - 1)
                last = list(range(len(prompts)))

        return seconds(run)

    return timed(once)


def largest(logits: Any, vocab: int) -> int:
    import numpy as np

    return int(np.ctypeslib.as_array(logits, shape=(vocab,)).argmax())


def timed(once: Callable[[list[list[int]], int], float]) -> Run:
    """Tokens a second of a run: of the prompts, or of what follows them, less the pass that reads them.

    Before the first the model is used once, untimed.
    """

    used = False

    def run(what: str, texts: int) -> float:
        nonlocal used
        length = LONG if what == "prefill" else IN
        prompts = torch.randint(1, 30_000, (texts, length), generator=torch.Generator().manual_seed(0)).tolist()
        if not used:  # each side is a model in use
            used = once(prompts, OUT) > 0
        if what == "prefill":
            return texts * length / once(prompts, 1)
        return texts * (OUT - 1) / (once(prompts, OUT) - once(prompts, 1))

    return run


# ------------------------------------------------------------------ turns


def serve(kind: str, path: Path, threads: int, compile: str) -> None:
    if kind == "read":
        run: Run = lambda what, texts: read_bandwidth()  # noqa: E731
    elif kind == "ours":
        run = ours(path, compile)
    else:
        run = transformers_side(path) if kind == "transformers" else llama_side(path, threads)
    answer(run)


def read_bandwidth() -> float:
    """Bytes a second at which 1 GB is summed."""
    block = torch.ones(1 << 27, dtype=torch.int64)
    return block.nbytes / min(seconds(block.sum) for _ in range(5))


def measure(case: tuple[str, str, str, int, str], folder: Path, args: Any, llama: bool) -> list[Row]:
    name, model, form, texts, what = case
    paths = {"ours": folder / f"{model}-{form}", "transformers": folder / f"{model}-bf16"}
    if llama:
        paths["llama.cpp"] = folder / f"{model}-{form}.gguf"
    if name == "1b-bf16":
        paths["read"] = folder
    flags = ["--compile", args.compile, "--threads", str(args.threads)]
    sides = {kind: Side([*flags, "--side", kind, "--path", str(path)]) for kind, path in paths.items()}
    found: dict[str, list[float]] = {kind: [] for kind in sides}
    for i in range(args.repeats + 1):
        for kind in sides if i % 2 == 0 else reversed(sides):
            found[kind].append(sides[kind].ask(what, texts))
    for side in sides.values():
        side.close()
    speed = {kind: sorted(x[1:])[len(x[1:]) // 2] for kind, x in found.items()}  # the first is a warm-up
    peer = "transformers" if form == "bf16" else "bf16"
    rows = [row(f"{name}/{peer}", speed["ours"], speed["transformers"], "tokens/s")]
    if llama:
        rows.append(row(f"{name}/llama.cpp", speed["ours"], speed["llama.cpp"], "tokens/s"))
    if "read" in speed:
        read = speed["ours"] * weights_read(folder / f"{model}-bf16")
        rows.append(row(f"{name}/read-bandwidth", read / 1e9, speed["read"] / 1e9, "GB/s"))
    return rows


def weights_read(folder: Path) -> int:
    """Bytes of the weights: all are read for each token, where the embedding is the output matrix, too."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = arguments(__doc__ or "", repeats=3)
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="on", help="our steps; warmed up untimed")
    parser.add_argument("--cases", nargs="+", choices=[case[0] for case in CASES], default=[case[0] for case in CASES])
    parser.add_argument("--folder", type=Path, help="keep the models here, and use what is there")
    parser.add_argument("--side", help="be one side: used by the script itself")
    parser.add_argument("--path", type=Path, help="its model: used by the script itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.side:
        serve(args.side, args.path, args.threads, args.compile)
        return
    llama = find_spec("llama_cpp") is not None
    if not llama:
        print("llama.cpp is left out: pip install llama-cpp-python", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        rows: list[Row] = []
        for model in SHAPES:
            chosen = [case for case in CASES if case[1] == model and case[0] in args.cases]
            if chosen and not (folder / f"{model}-bf16").exists():
                make(folder, model, llama)
            for case in chosen:
                rows += measure(case, folder, args, llama)
    report(rows, args, "decode")


if __name__ == "__main__":
    main()
