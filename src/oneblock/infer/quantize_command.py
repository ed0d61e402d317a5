"""`oneblock quantize`: fewer bits, and what they cost."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from tyro.conf import Positional

from oneblock.errors import OneblockError
from oneblock.files import replace_file, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from oneblock.infer.llm import LLM
    from oneblock.quant.quality import Quality
    from oneblock.quant.quantize import QuantConfig

CONTEXT = 512  # tokens in a row of a text that calibrates or compares
CALIBRATED = 16_384  # tokens in all
COMPARED, HELD = 8_192, 5e8  # tokens, and the log-probabilities that are held of them at most


@dataclass(frozen=True)
class QuantizeOptions:
    """Write a model with its matrices in 8 or 4 bits, or compare the ways of doing so."""

    model: Positional[str]  # a model's folder, a .gguf file, or its org/name on the hub
    out: Positional[Path]  # the folder to write
    bits: int = 8  # 8 or 4
    group: int = 64  # columns that share a range, in 4 bits: 32, 64 or 128
    fp8: bool = False  # 8 bits as floats, which GPUs since Ada and Hopper multiply as they are
    calibrate: Path | None = None  # a text whose activations choose the 4-bit codes (GPTQ): slower, and closer
    report: bool = False  # write no model but a table and a plot of all ways, on --text
    text: Path | None = None  # what --report reads
    json: bool = False  # print the table as JSON


def quantize(options: QuantizeOptions) -> None:
    from oneblock.infer.llm import load
    from oneblock.quant.quantize import QuantConfig, weight_bytes

    bits = QuantConfig(options.bits, options.group, options.fp8)
    if options.calibrate and bits.bits != 4 and not options.report:
        raise OneblockError("--calibrate is for 4 bits: 8 bits have no use for it")
    if options.report:
        report(options)
        return
    llm = load(options.model, "bfloat16")
    before = weight_bytes(llm.model)
    shrink(llm, bits, options.calibrate)
    llm.save(options.out)
    print(f"{before / 1e9:.3g} GB in bf16, {weight_bytes(llm.model) / 1e9:.3g} GB in {bits.bits} bits: {options.out}")


def shrink(llm: LLM, bits: QuantConfig, text: Path | None) -> None:
    """In place."""
    from oneblock.quant import quantize as plain
    from oneblock.quant.gptq import calibrate

    if text is None:
        plain.quantize(llm.model, bits)
        return
    console = Console(stderr=True)
    with console.status("calibrating") as status:
        calibrate(
            llm.model, bits, rows(llm, text, CALIBRATED), lambda n: status.update(f"layer {n} of {llm.spec.n_layers}")
        )


def rows(llm: LLM, path: Path, most: float, last: bool = False) -> Tensor:
    """A text's first or last rows of ids, (B, T), of so many tokens at most."""
    import torch

    if not path.is_file():
        raise OneblockError(f"{path}: there is no such text file")
    ids = llm.encode(path.read_text(encoding="utf-8", errors="replace"))
    length = min(CONTEXT, llm.spec.context)
    if len(ids) < length:
        raise OneblockError(f"{path}: has {len(ids)} tokens; give a text of at least {length}")
    count = max(int(min(len(ids), most) // length), 1)
    return torch.tensor(ids[-count * length :] if last else ids[: count * length]).view(count, length)


# ------------------------------------------------------------------ report


def report(options: QuantizeOptions) -> None:
    """A table, quantize.json and quantize.png of every way beside bf16."""
    if options.text is None:
        raise OneblockError("--report needs a text to read: --text FILE")
    found = compared(options, options.text)
    lines = jsonlib.dumps([asdict(q) for q in found], indent=1)
    write_file(options.out / "quantize.json", lines + "\n")
    plot(found, options.out / "quantize.png")
    print(lines if options.json else table(found))


def compared(options: QuantizeOptions, text: Path) -> list[Quality]:
    from oneblock.infer.llm import load
    from oneblock.quant.quality import quality, reference
    from oneblock.quant.quantize import QuantConfig

    plain = load(options.model, "bfloat16")
    ids = rows(plain, text, min(COMPARED, HELD / plain.spec.vocab), last=True)
    expected = reference(plain.model, ids)
    found = [quality("bf16", plain.model, ids, expected)]
    del plain
    ways = [("8 bits", QuantConfig(8), None), ("8-bit floats", QuantConfig(8, fp8=True), None)]
    ways += [(f"4 bits, group {g}", QuantConfig(4, g), None) for g in (32, 64, 128)]
    if options.calibrate:
        ways += [(f"4 bits, group {g}, calibrated", QuantConfig(4, g), options.calibrate) for g in (32, 64, 128)]
    for name, bits, by in ways:
        llm = load(options.model, "bfloat16")
        shrink(llm, bits, by)
        found.append(quality(name, llm.model, ids, expected))
    return found


def table(found: list[Quality]) -> str:
    lines = [f"{'':<28}{'MB':>9}{'tokens/s':>10}{'perplexity':>12}{'to bf16':>9}{'+-':>7}{'KL':>9}{'same top':>10}"]
    for q in found:
        more = q.perplexity / found[0].perplexity - 1
        lines.append(
            f"{q.name:<28}{q.bytes / 1e6:>9,.1f}{q.speed:>10.1f}{q.perplexity:>12.4f}{more:>+9.2%}{q.error:>7.2%}"
            f"{q.divergence:>9.4f}{q.agreement:>10.1%}"
        )
    return "\n".join(lines)


def plot(found: list[Quality], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for q in found[1:]:
        left.scatter(q.bytes / 1e6, q.divergence, label=q.name)
        right.scatter(q.speed, q.perplexity / found[0].perplexity)
    right.scatter(found[0].speed, 1.0, color="black", label="bf16")
    right.legend()
    left.set(xlabel="MB", ylabel="KL divergence to bf16, nats", ylim=(0, None))
    right.set(xlabel="tokens/s, one text", ylabel="perplexity, bf16 = 1")
    left.legend(fontsize="small")
    with replace_file(path) as new:
        figure.savefig(new, dpi=120, format="png")
