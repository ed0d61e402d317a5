"""`oneblock quantize`: write a model in int8, int4 or fp8, or measure what each format costs."""

from __future__ import annotations

import json as jsonlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from tyro.conf import Positional

from oneblock.errors import OneblockError
from oneblock.files import refuse_same_folder, replace_file, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from oneblock.infer.llm import LLM
    from oneblock.model import Decoder
    from oneblock.quant.quality import Quality
    from oneblock.quant.quantize import QuantConfig

SEQUENCE_LENGTH = 512  # tokens per calibration or evaluation sequence
CALIBRATION_TOKENS = 16_384
EVALUATION_TOKENS, MAX_LOGPROBS = 8_192, 5e8  # at most so many tokens, and reference log-probabilities in memory
TIMED_TOKENS = 24  # decoded to measure speed


@dataclass(frozen=True)
class QuantizeOptions:
    """Quantize a model's weight matrices to int8, int4 or fp8, or compare the formats on a text."""

    model: Positional[str]  # a model's folder, a GGUF file, or org/name on the hub
    out: Positional[Path]  # folder to write
    bits: Literal[4, 8] = 8  # bits per weight
    group: Literal[32, 64, 128] = 64  # int4: weights of a row that share a scale and a zero point
    fp8: bool = False  # 8-bit floats (e4m3) instead of int8; GPUs since Ada and Hopper multiply them directly
    calibrate: Path | None = None  # int4: text file for GPTQ calibration; slower, smaller error
    report: bool = False  # write no model: compare all formats on --text (table, quantize.json, quantize.png)
    text: Path | None = None  # text file that --report evaluates
    json: bool = False  # print the report as JSON


def quantize(options: QuantizeOptions) -> None:
    from oneblock.infer.llm import load
    from oneblock.quant.quantize import QuantConfig, unquantized, weight_bytes

    config = QuantConfig(options.bits, options.group, options.fp8)
    if options.report:
        report(options)
        return
    if options.calibrate and config.bits != 4:
        raise OneblockError(f"--calibrate is for int4, not {config}; add --bits 4 or leave out --calibrate")
    refuse_same_folder(options.out, options.model)
    llm = load(options.model, "bfloat16")
    before = weight_bytes(llm.model)
    quantize_model(llm, config, options.calibrate)
    llm.save(options.out)
    for reason, names in group_by_reason(unquantized(llm.model, config)).items():
        print(f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} stay in bf16: {reason}")
    print(f"{options.out}: {weight_bytes(llm.model) / 1e9:.3g} GB in {config}, from {before / 1e9:.3g} GB in bf16")


def group_by_reason(unquantized: dict[str, str]) -> dict[str, list[str]]:
    """Names by reason; config.json lists every name."""
    return {reason: [n for n, r in unquantized.items() if r == reason] for reason in unquantized.values()}


def quantize_model(llm: LLM, config: QuantConfig, text: Path | None) -> None:
    """Quantize in place, by GPTQ if there is a calibration text."""
    from oneblock.infer.prepare import prepare_for_inference

    if text is None:
        prepare_for_inference(llm.model, quant=config)
        return
    ids = read_sequences(llm, text, CALIBRATION_TOKENS)
    with Console(stderr=True).status("calibrating") as status:
        prepare_for_inference(
            llm.model,
            quant=config,
            calibration_ids=ids,
            report=lambda n: status.update(f"calibrated {n} of {llm.spec.n_layers} layers"),
        )


def read_sequences(llm: LLM, path: Path, max_tokens: float, from_end: bool = False) -> Tensor:
    """Ids (B, T) of the first or last sequences of a text, of at most so many tokens in all."""
    import torch

    if not path.is_file():
        raise OneblockError(f"{path}: no such text file; give a file of plain text")
    ids = llm.encode(path.read_text(encoding="utf-8", errors="replace"))
    length = min(SEQUENCE_LENGTH, llm.spec.context)
    if len(ids) < length:
        raise OneblockError(f"{path}: has {len(ids)} tokens; give a text of at least {length}")
    n = max(int(min(len(ids), max_tokens) // length), 1)
    return torch.tensor(ids[-n * length :] if from_end else ids[: n * length]).view(n, length)


# ------------------------------------------------------------------ report


def report(options: QuantizeOptions) -> None:
    """Write quantize.json and quantize.png, and print a table, of every format beside bf16."""
    if options.text is None:
        raise OneblockError("--report needs a text to evaluate; add --text FILE")
    rows = compare_formats(options, options.text)
    lines = jsonlib.dumps([asdict(q) for q in rows], indent=1)
    write_file(options.out / "quantize.json", lines + "\n")
    plot(rows, options.out / "quantize.png")
    print(lines if options.json else format_table(rows))


def compare_formats(options: QuantizeOptions, text: Path) -> list[Quality]:
    """Quality of bf16 and of each format that fits the model."""
    from oneblock.infer.llm import load
    from oneblock.quant.quality import compute_reference, measure_quality
    from oneblock.quant.quantize import QuantConfig

    llm = load(options.model, "bfloat16")
    ids = read_sequences(llm, text, min(EVALUATION_TOKENS, MAX_LOGPROBS / llm.spec.vocab), from_end=True)
    reference = compute_reference(llm.model, ids)
    rows = [measure_quality("bf16", llm.model, ids, reference, measure_speed(llm.model, ids[0]))]
    formats = [(str(c), c, None) for c in (QuantConfig(8), QuantConfig(8, fp8=True))]
    int4 = [QuantConfig(4, group) for group in (32, 64, 128)]
    formats += [(str(c), c, None) for c in int4]
    formats += [(f"{c}, calibrated", c, options.calibrate) for c in int4 if options.calibrate]
    for name, config, calibration in formats:
        llm = load(options.model, "bfloat16")
        try:
            quantize_model(llm, config, calibration)
        except OneblockError as error:
            Console(stderr=True).print(f"{name} is left out: {error}")
            continue
        rows.append(measure_quality(name, llm.model, ids, reference, measure_speed(llm.model, ids[0])))
    return rows


def measure_speed(model: Decoder, ids: Tensor) -> float:
    """Decoded tokens per second after a prompt of 16, the better of two runs."""
    return max(time_decoding(model, ids) for _ in range(2))


def time_decoding(model: Decoder, ids: Tensor) -> float:
    import torch

    from oneblock.infer.cache import KVCache

    with torch.inference_mode():
        cache = KVCache(model.spec, 1, 16 + TIMED_TOKENS, model.dtype, model.device)
        next_id = model(ids[None, :16], cache=cache)[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(TIMED_TOKENS):
            next_id = model(next_id, cache=cache)[:, -1:].argmax(-1)
        return TIMED_TOKENS / (time.perf_counter() - start)


def format_table(rows: list[Quality]) -> str:
    lines = [f"{'':<28}{'MB':>9}{'tokens/s':>10}{'perplexity':>12}{'vs bf16':>9}{'+-':>7}{'KL':>9}{'same top':>10}"]
    for q in rows:
        increase = q.perplexity / rows[0].perplexity - 1
        lines.append(
            f"{q.name:<28}{q.bytes / 1e6:>9,.1f}{q.speed:>10.1f}{q.perplexity:>12.4f}{increase:>+9.2%}{q.error:>7.2%}"
            f"{q.divergence:>9.4f}{q.agreement:>10.1%}"
        )
    return "\n".join(lines)


def plot(rows: list[Quality], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for q in rows[1:]:
        left.scatter(q.bytes / 1e6, q.divergence, label=q.name)
        right.scatter(q.speed, q.perplexity / rows[0].perplexity)
    right.scatter(rows[0].speed, 1.0, color="black", label="bf16")
    right.legend()
    left.set(xlabel="MB", ylabel="KL divergence from bf16, nats", ylim=(0, None))
    right.set(xlabel="tokens/s, batch of one", ylabel="perplexity, bf16 = 1")
    left.legend(fontsize="small")
    with replace_file(path) as new:
        figure.savefig(new, dpi=120, format="png")
