"""Planned beside measured memory of training and serving six architectures: `python benchmarks/memory.py`.

Measured is the peak of resident (on a GPU: allocated) memory, less that of the process before the model was built.
`--save` also writes the table into docs/memory.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common import Row, arguments, cpu_name, report, row
from oneblock.kernels.huge_pages import reuse_memory
from oneblock.model import Decoder, init_weights
from oneblock.plan import memory, params
from oneblock.spec import Spec, get_spec
from oneblock.train.machine import peak_memory, product_dtype
from oneblock.train.options import Loop, Optimizer, Schedule
from oneblock.train.preflight import parallelism_of

if TYPE_CHECKING:
    from oneblock.parallel.world import World

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"


@dataclass(frozen=True)
class Case:
    model: str
    changes: dict[str, Any]
    batch: int
    context: int
    checkpointing: Any = "none"
    mesh: str = ""  # ranks on this machine

    @property
    def spec(self) -> Spec:
        return get_spec(self.model, **self.changes)

    @property
    def title(self) -> str:
        return (
            f"{self.model}, {params.total(self.spec) / 1e6:.0f}M, {self.batch} x {self.context}"
            + (f", checkpointing {self.checkpointing}" if self.checkpointing != "none" else "")
            + (f", each of {self.mesh}" if self.mesh else "")
        )


MIXTURE = {"n_layers": 4, "vocab": 16_000, "dim": 768, "hidden_dim": 2048, "n_heads": 12, "n_kv_heads": 4}
LLAMA = {"n_layers": 3, "vocab": 32_000}
CASES = {
    "gpt2": Case("gpt2", {}, 4, 512),
    "gpt2-full": Case("gpt2", {}, 8, 512, "full"),
    "gpt2-selective": Case("gpt2", {}, 4, 512, "selective"),
    "llama": Case("llama-3.2-1b", LLAMA, 2, 512),
    "gemma3": Case("gemma-3-270m", {"n_layers": 6}, 2, 512),
    "qwen3": Case("qwen3-0.6b", {"n_layers": 6, "vocab": 32_000}, 4, 256),
    "pythia": Case("pythia-160m", {}, 2, 1024),
    "mixtral": Case("mixtral-8x7b", MIXTURE, 2, 512),
    "llama-dp": Case("llama-3.2-1b", LLAMA, 4, 512, mesh="dp=2"),
    "llama-fsdp": Case("llama-3.2-1b", LLAMA, 4, 512, mesh="fsdp=2"),
    "llama-tp": Case("llama-3.2-1b", LLAMA, 2, 512, mesh="tp=2"),
    "llama-cp": Case("llama-3.2-1b", LLAMA, 2, 1024, mesh="cp=2"),
    "llama-pp": Case("llama-3.2-1b", LLAMA | {"n_layers": 4}, 2, 512, mesh="pp=2"),
    "mixtral-ep": Case("mixtral-8x7b", MIXTURE, 4, 512, mesh="ep=2"),
}
SERVED = ("gpt2", "llama", "gemma3", "qwen3", "pythia", "mixtral")


def train_peak(case: Case, device: torch.device) -> tuple[int, int]:
    """Planned and measured bytes of three training steps; with ranks, of the rank that needs most."""
    from oneblock.parallel.world import init_world

    with init_world(case.mesh, str(device)) as world:
        before = base_memory(device)
        steps(case, device, world)
        peak = torch.tensor(float(peak_memory(device) - before))
        if world.size > 1:
            torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    dtype, parts = str(product_dtype(Loop(device=str(device)))).removeprefix("torch."), parallelism_of(world.mesh)
    config = memory.TrainingConfig(
        dtype, case.checkpointing, accumulate=world.uses_ddp, cpu=device.type == "cpu", parallelism=parts
    )
    return memory.training(case.spec, case.context, case.batch // world.data_ranks, config).total, int(peak)


def steps(case: Case, device: torch.device, world: World) -> None:
    from oneblock.data.packed import Batch
    from oneblock.parallel import parallelize as parallel
    from oneblock.train.build import transform_model
    from oneblock.train.loop import ModelWithLoss, TrainStep, start
    from oneblock.train.task import Pretraining

    loop, rows = (
        Loop(activation_checkpointing=case.checkpointing, device=str(device), compile="off"),
        case.batch // world.data_ranks,
    )
    model = Decoder(case.spec)
    init_weights(model, 0)
    model = model.to(device)
    model = transform_model(model, loop, world)
    ids = torch.randint(model.spec.vocab, (rows, case.context + 1))
    data = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * case.context)
    state = start(model, Optimizer(), Pretraining(lambda n: data))
    learner = parallel.wrap_ddp(ModelWithLoss(model, state.task), world)
    engine = TrainStep(learner, loop, Optimizer(), Schedule(), world)
    for _ in range(3):
        engine.update(state)


def serve_peak(case: Case, device: torch.device) -> tuple[int, int]:
    """Planned and measured bytes of generating 16 tokens for each of `batch` prompts, in bf16."""
    from oneblock.infer.llm import LLM

    before = base_memory(device)
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


def base_memory(device: torch.device) -> int:
    """Peak memory of the process once libraries are loaded."""
    x = torch.randn(256, 256, device=device).bfloat16()
    (x @ x).sum().item()
    return peak_memory(device)


def measure_case(name: str, kind: str, device: str) -> tuple[int, int]:
    argv, ranks = [__file__, "--case", name, "--kind", kind, "--device", device], 2 if CASES[name].mesh else 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    lines = subprocess.check_output([sys.executable, *torchrun, *argv], text=True).splitlines()
    planned, peak = json.loads(lines[-1])
    return planned, peak


def table(rows: list[Row]) -> str:
    lines = ["| what | planned | measured | ratio |", "|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['name']} | {r['ours']:.2f} GB | {r['peer']:.2f} GB | {r['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = arguments(__doc__ or "", pairs=1)
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
            planned, peak = measure_case(name, kind, args.device)
            rows.append(row(f"{kind} {CASES[name].title}", planned / 1e9, peak / 1e9, "GB"))
    report(rows, args, "memory" if args.device == "cpu" else "memory-gpu")
    if args.save and args.device == "cpu":
        write_page(rows)
    return int(any(not 0.9 <= r["ratio"] <= 1.1 for r in rows))


def write_page(rows: list[Row]) -> None:
    """Replace the table between the markers of docs/memory.md."""
    text = PAGE.read_text()
    head, _, tail = text.partition("<!-- table -->\n")
    tail = tail.partition("<!-- end -->")[2]
    note = f"\n{cpu_name()}, torch {torch.__version__}.\n"
    PAGE.write_text(f"{head}<!-- table -->\n{table(rows)}\n{note}<!-- end -->{tail}")


if __name__ == "__main__":
    sys.exit(main())
