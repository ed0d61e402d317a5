"""Time to first token of a new process, and memory while decoding: `python benchmarks/start.py`.

The 100M Llama of decode.py, bf16, random weights. Time is the wall time of a whole process that generates one token:
`oneblock generate`, and a script that loads the same folder with transformers. Memory is the growth of a process after
generating 128 tokens from a prompt of 128, beside the bytes of its weights and KV cache. `--against CHECKOUT` compares
the time with another commit instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from common import Row, Sample, arguments, measure_pairs, pair_row, report, row, seconds, take_sample
from decode import make_models

PROMPT, NEW = 128, 128

PEER = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = torch.tensor([[1, 2, 3]])
print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0))
"""


def run_process(argv: list[str], env: dict[str, str] | None = None) -> Sample:
    """Seconds of a whole process."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    return take_sample(lambda: seconds(lambda: subprocess.run(argv, check=True, env=env, **quiet)))  # type: ignore[call-overload]


def first_token(folder: Path, args: Namespace) -> Row:
    ours = [sys.executable, "-m", "oneblock", "generate", str(folder), "--ids", "1", "2", "3", "--max-tokens", "1"]
    peer, env, name = [sys.executable, "-c", PEER, str(folder)], {}, "transformers"
    if args.against:
        peer, env, name = ours, {"PYTHONPATH": str(args.against.resolve() / "src")}, "previous"
    pairs = measure_pairs(lambda: run_process(ours), lambda: run_process(peer, env), args.pairs, args.most)
    return pair_row(f"100m-first-token/{name}", pairs, "s", lower_is_better=True)


def memory(folder: Path) -> None:
    """Print the bytes by which loading and decoding grew this process, and the bytes of weights and KV cache."""
    import oneblock
    from oneblock.plan.cache import kv_bytes

    oneblock.load(folder).generate([[1, 2, 3]], max_tokens=2, temperature=0, ignore_eos=True)  # loads the libraries
    before = resident()
    llm = oneblock.load(folder)
    llm.compile = "off"
    llm.generate([list(range(1, PROMPT + 1))], max_tokens=NEW, temperature=0, ignore_eos=True)
    expected = sum(p.nbytes for p in llm.model.parameters()) + kv_bytes(llm.spec, PROMPT + NEW)
    print(resident() - before, expected)


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def steady_memory(folder: Path) -> Row:
    argv = [sys.executable, __file__, "--memory-of", str(folder)]
    grown, expected = map(int, subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split())
    return row("100m-memory/weights-and-cache", grown / 1e6, expected / 1e6, "MB", lower_is_better=True)


def main() -> None:
    parser = arguments(__doc__ or "", pairs=20)
    parser.add_argument("--most", type=int, default=60, help="most pairs")
    parser.add_argument("--folder", type=Path, help="keep the model here, and use what is there")
    parser.add_argument("--memory-of", type=Path, help="used by the script itself")
    args = parser.parse_args()
    if args.memory_of:
        memory(args.memory_of)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "100m-bf16").exists():
            make_models(folder, "100m", llama=False)
        report([first_token(folder / "100m-bf16", args), steady_memory(folder / "100m-bf16")], args, "start")


if __name__ == "__main__":
    main()
