"""What `plan` says of memory beside what was measured: training and serving of six architectures, each in a process.

Measured: the most that is resident (on a GPU: allocated), less what the process held before the model was made.
`--save` also writes the table into docs/memory.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import Row, arguments, cpu_name, report, row
from oneblock.memory import reuse_memory
from oneblock.model import Decoder, init_weights
from oneblock.plan import memory, params
from oneblock.spec import Spec, spec
from oneblock.train.machine import peak_memory, product_dtype
from oneblock.train.options import Loop, Objective, Optimizer, Schedule

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"


@dataclass(frozen=True)
class Case:
    model: str
    changes: dict[str, Any]
    batch: int
    context: int
    recompute: Any = "none"

    @property
    def spec(self) -> Spec:
        return spec(self.model, **self.changes)

    @property
    def title(self) -> str:
        return f"{self.model}, {params.total(self.spec) / 1e6:.0f}M, {self.batch} x {self.context}" + (
            f", recompute {self.recompute}" if self.recompute != "none" else ""
        )


MIXTURE = {"n_layers": 4, "vocab": 16_000, "dim": 768, "hidden": 2048, "n_heads": 12, "n_kv_heads": 4}
CASES = {
    "gpt2": Case("gpt2", {}, 4, 512),
    "gpt2-full": Case("gpt2", {}, 8, 512, "full"),
    "gpt2-selective": Case("gpt2", {}, 4, 512, "selective"),
    "llama": Case("llama-3.2-1b", {"n_layers": 3, "vocab": 32_000}, 2, 512),
    "gemma3": Case("gemma-3-270m", {"n_layers": 6}, 2, 512),
    "qwen3": Case("qwen3-0.6b", {"n_layers": 6, "vocab": 32_000}, 4, 256),
    "pythia": Case("pythia-160m", {}, 2, 1024),
    "mixtral": Case("mixtral-8x7b", MIXTURE, 2, 512),
}
SERVED = ("gpt2", "llama", "gemma3", "qwen3", "pythia", "mixtral")


def train_peak(case: Case, device: torch.device) -> tuple[int, int]:
    """Bytes planned and measured of three training steps."""
    from oneblock.data.rows import Batch
    from oneblock.train.assemble import learner_for
    from oneblock.train.loop import Engine, start
    from oneblock.train.world import World

    loop = Loop(batch=case.batch, recompute=case.recompute, device=str(device), compile="off")
    before = settled(device)
    model = Decoder(case.spec)
    init_weights(model, 0)
    state = start(model.to(device), Optimizer())
    ids = torch.randint(model.spec.vocab, (case.batch, case.context + 1))
    data = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), case.batch * case.context)
    learner = learner_for(model, loop, Objective(), None, World())
    engine = Engine(learner, lambda n: data, loop, Optimizer(), Schedule(), World())
    for _ in range(3):
        engine.update(state)
    dtype = str(product_dtype(loop)).removeprefix("torch.")
    setup = memory.Setup(dtype, case.recompute, cpu=device.type == "cpu")
    return memory.training(case.spec, case.context, case.batch, setup).total, peak_memory(device) - before


def serve_peak(case: Case, device: torch.device) -> tuple[int, int]:
    """Bytes planned and measured of reading `batch` texts and writing 16 tokens to each, in bf16."""
    from oneblock.infer.llm import LLM

    before = settled(device)
    with torch.device("meta"):
        model = Decoder(case.spec).to(torch.bfloat16)
    model = model.to_empty(device=device)
    model.tie()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    prompts = torch.randint(case.spec.vocab, (case.batch, case.context - 16)).tolist()
    LLM(model, None).generate(prompts, max_tokens=16)
    return memory.serving(case.spec, case.context, case.batch, cpu=device.type == "cpu").total, peak_memory(
        device
    ) - before


def settled(device: torch.device) -> int:
    """What the process holds once libraries are loaded; training keeps freed memory, serving gives it back."""
    x = torch.randn(256, 256, device=device).bfloat16()
    (x @ x).sum().item()
    return peak_memory(device)


def measured(name: str, kind: str, device: str) -> tuple[int, int]:
    argv = [sys.executable, __file__, "--case", name, "--kind", kind, "--device", device]
    planned, found = json.loads(subprocess.check_output(argv, text=True))
    return planned, found


def table(rows: list[Row]) -> str:
    lines = ["| what | planned | measured | ratio |", "|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['name']} | {r['ours']:.2f} GB | {r['peer']:.2f} GB | {r['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = arguments(__doc__ or "", repeats=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", choices=CASES, help="measure one case in this process: used by the script itself")
    parser.add_argument("--kind", choices=("train", "serve"), default="train")
    args = parser.parse_args()
    if args.case:
        reuse_memory() if args.kind == "train" else None
        run = train_peak if args.kind == "train" else serve_peak
        print(json.dumps(run(CASES[args.case], torch.device(args.device))))
        return 0
    rows = []
    for kind, names in (("train", tuple(CASES)), ("serve", SERVED)):
        for name in names:
            planned, found = measured(name, kind, args.device)
            rows.append(row(f"{kind} {CASES[name].title}", planned / 1e9, found / 1e9, "GB"))
    report(rows, args, "memory" if args.device == "cpu" else "memory-gpu")
    if args.save and args.device == "cpu":
        write_page(rows)
    return int(any(not 0.9 <= r["ratio"] <= 1.1 for r in rows))


def write_page(rows: list[Row]) -> None:
    """Between the marks of the page, so that its words stay."""
    text = PAGE.read_text()
    head, _, rest = text.partition("<!-- table -->\n")
    tail = rest.partition("<!-- end -->")[2]
    note = f"\n{cpu_name()}, torch {torch.__version__}.\n"
    PAGE.write_text(f"{head}<!-- table -->\n{table(rows)}\n{note}<!-- end -->{tail}")


if __name__ == "__main__":
    sys.exit(main())
