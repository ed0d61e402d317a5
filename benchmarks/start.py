"""From the command to the first token, and the memory that decoding holds: `python benchmarks/start.py`.

The 100M Llama of decode.py, in bf16, random weights. Time is that of a whole process that writes one token: `oneblock
generate`, and a script that loads the same folder with transformers. Memory is what a process has grown by once 128
tokens have followed 128, against the bytes of its weights and its cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Row, alternate, arguments, report, row, seconds
from decode import IN, OUT, make

THEIRS = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = torch.tensor([[1, 2, 3]])
print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0))
"""


def process(argv: list[str]) -> float:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return seconds(lambda: subprocess.run(argv, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **quiet))  # type: ignore[call-overload]


def first_token(folder: Path, repeats: int) -> Row:
    ours = [sys.executable, "-m", "oneblock", "generate", str(folder), "--ids", "1", "2", "3", "--max-tokens", "1"]
    theirs = [sys.executable, "-c", THEIRS, str(folder)]
    found = alternate(lambda: process(ours), lambda: process(theirs), repeats)
    return row("100m-first-token/transformers", *found, "s", lower_is_better=True)


def memory(folder: Path) -> None:
    """Print the bytes that loading and decoding added to this process, and those of weights and cache."""
    import oneblock
    from oneblock.plan.cache import kv_bytes

    oneblock.load(folder).generate([[1, 2, 3]], max_tokens=2, temperature=0, ignore_eos=True)  # the code itself
    before = resident()
    llm = oneblock.load(folder)
    llm.compile = "off"
    llm.generate([list(range(1, IN + 1))], max_tokens=OUT, temperature=0, ignore_eos=True)
    held = sum(p.nbytes for p in llm.model.parameters()) + kv_bytes(llm.spec, IN + OUT)
    print(resident() - before, held)


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def steady_memory(folder: Path) -> Row:
    argv = [sys.executable, __file__, "--memory-of", str(folder)]
    grown, held = map(int, subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split())
    return row("100m-memory/weights-and-cache", grown / 1e6, held / 1e6, "MB", lower_is_better=True)


def main() -> None:
    parser = arguments(__doc__ or "", repeats=3)
    parser.add_argument("--folder", type=Path, help="keep the model here, and use what is there")
    parser.add_argument("--memory-of", type=Path, help="used by the script itself")
    args = parser.parse_args()
    if args.memory_of:
        memory(args.memory_of)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "100m-bf16").exists():
            make(folder, "100m", llama=False)
        report([first_token(folder / "100m-bf16", args.repeats), steady_memory(folder / "100m-bf16")], args, "start")


if __name__ == "__main__":
    main()
