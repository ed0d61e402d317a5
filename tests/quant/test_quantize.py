"""Wint8 formats, quantized models and their folders, GPTQ, and the quantize command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import oneblock
from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.kernels.build import has_compiler
from oneblock.kernels.cpu_modules import optimize_for_cpu
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.model import Decoder, init_weights
from oneblock.model.mlp import Experts
from oneblock.quant.formats import (
    QuantParams,
    fit_quant_params,
    pack_tiles,
    quantize_int4,
    quantize_int8,
    row_scales,
    unpack_rows,
)
from oneblock.quant.gptq import calibrate, collect_hessians, gptq_quantize
from oneblock.quant.linear import Float8Linear, QuantizedLinear
from oneblock.quant.modules import QuantizedExperts
from oneblock.quant.quantize import QuantConfig, quantize, round_to_nearest
from oneblock.spec import get_spec
from oneblock.store import load_model

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def small(family: str, **sizes: int) -> Decoder:
    sizes = {"vocab": 100, "dim": 64, "n_layers": 2, "n_heads": 2, "context": 64, **sizes}
    model = Decoder(get_spec(family, **sizes))
    init_weights(model, 0)
    use_fast_kernels(model)  # as loaded models do: equal bit for bit
    return model.eval()


# ------------------------------------------------------------------ formats


@pytest.mark.parametrize(("bits", "columns"), [(8, 12), (4, 24)])
def test_unpacking_inverts_packing(bits: int, columns: int) -> None:
    q = torch.randint(1 << bits, (37, columns), dtype=torch.uint8)
    tiles = pack_tiles(q, bits)
    rows = torch.cat([unpack_rows(tiles[t, :, lane][None], bits) for t in range(3) for lane in range(16)])
    assert torch.equal(rows[:37], q)


def test_rounding_errors_are_small() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 128)
    int8 = QuantizedLinear(40, 128, 0)
    int8.set_weight(*quantize_int8(weight))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((int8.dequantize() - weight).abs() <= step * 0.5001).all()
    errors = []
    for group in (32, 64, 128):
        int4 = QuantizedLinear(40, 128, group)
        int4.set_weight(*quantize_int4(weight, group))
        errors.append((int4.dequantize() - weight).norm() / weight.norm())
        assert torch.equal(int4.dequantize(torch.tensor([3, 39])), int4.dequantize()[[3, 39]])
    assert errors[0] < errors[1] < errors[2] < 0.12


WEIGHTS = {
    "normal": lambda w: w,
    "tiny": lambda w: w * 1e-9,
    "rows of all sizes": lambda w: w * torch.logspace(-4, 4, 32)[:, None],
    "an outlier column": lambda w: w * torch.where(torch.arange(256) == 7, 50.0, 1.0),
    "positive": lambda w: w.abs() + 2,
    "negative": lambda w: -w.abs() - 2,
    "zeros": torch.zeros_like,
}


def error_with_fp32_params(weight: torch.Tensor, shrink: float) -> torch.Tensor:
    """Squared error of each group of 64 with an fp32 scale and zero point."""
    groups = weight.unflatten(1, (-1, 64))
    low, high = (x[..., None] * shrink for x in (groups.amin(-1), groups.amax(-1)))
    step = ((high - low) / 15).clamp(min=1e-30)
    return (((groups - low) / step).round().clamp(0, 15) * step + low - groups).square().sum(-1)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_8_bit_group_params_add_little_error(kind: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[kind](torch.randn(32, 256))
    q, params = quantize_int4(weight, 64)
    error = (params.dequantize(q.unflatten(1, (-1, 64))).flatten(1) - weight).norm()
    best = torch.stack(
        [error_with_fp32_params(weight, shrink) for shrink in torch.linspace(1, 0.64, 10).tolist()]
    ).amin(0)
    assert error <= (1.7 if kind == "negative" else 1.03) * best.sum().sqrt()  # the zero point must be 0 .. 15
    for x in (params.group_qscale, params.qzero):
        assert torch.equal(x, x.to(torch.uint8).float())


def test_large_weights_are_quantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 128)
    scale, groups = row_scales(weight, 64, 1.1), weight.unflatten(1, (-1, 64))

    def dequantized(rows: slice) -> torch.Tensor:
        params = fit_quant_params(groups[rows], scale[rows])
        return params.dequantize(params.quantize(groups[rows]))

    assert torch.equal(dequantized(slice(6, 12)), dequantized(slice(0, 20))[6:12])
    q, params = quantize_int4(weight, 64)
    monkeypatch.setattr("oneblock.quant.formats.CHUNK", 128 * 6)
    chunked_q, chunked_params = quantize_int4(weight, 64)
    assert torch.equal(chunked_q, q)
    for name in ("scale", "group_qscale", "qzero"):
        assert torch.equal(getattr(chunked_params, name), getattr(params, name))


def test_gptq_output_error_is_smaller() -> None:
    """On correlated inputs the layer's output is closer, though its weights are not."""
    torch.manual_seed(0)
    x = torch.randn(500, 128) @ torch.randn(128, 128) * torch.rand(128) ** 3
    weight = torch.randn(50, 128)

    def output_error(q: torch.Tensor, params: QuantParams) -> float:
        layer = QuantizedLinear(50, 128, 64)
        layer.set_weight(q, params)
        return ((x @ layer.dequantize().T - x @ weight.T).norm() / (x @ weight.T).norm()).item()

    assert output_error(*gptq_quantize(weight, x.T @ x, 64)) < 0.8 * output_error(*quantize_int4(weight, 64))


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("bits", [QuantConfig(8), QuantConfig(4, 32), QuantConfig(8, fp8=True)], ids=["8", "4", "fp8"])
def test_a_saved_quantized_model_loads_bit_for_bit(family: str, bits: QuantConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small(family)
    ids = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(ids)
        quantized = quantize(model, bits)(ids)
    assert any(isinstance(m, Float8Linear if bits.fp8 else QuantizedLinear) for m in model.modules())
    assert (family in ("mixtral", "gpt_oss")) == any(isinstance(m, QuantizedExperts) for m in model.modules())
    assert (quantized - exact).norm() / exact.norm() < (0.5 if bits.bits == 4 else 0.15 if bits.fp8 else 0.05)
    LLM(model, generation_config={"temperature": 0.5}).save(tmp_path / "quantized")
    back = oneblock.load(tmp_path / "quantized")
    assert back.generation_config == {"temperature": 0.5}
    with torch.no_grad():
        assert torch.equal(back.model(ids), quantized)
    assert back.spec == model.spec


def test_fp8_gemm_can_be_traced() -> None:
    """On a GPU's fake tensors, as torch.compile does."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        layer = Float8Linear(48, 64, torch.empty(48, dtype=torch.bfloat16))
        y = layer.forward_scaled_mm(torch.empty(2, 3, 64, dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 48), torch.bfloat16, "cuda")


@pytest.mark.skipif(TORCH < (2, 13), reason="torch's CPU implementation has no scale per row")
def test_fp8_gemm() -> None:
    """The GPU's operator, by its CPU implementation."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(2, 3, 64).bfloat16()
    layer = Float8Linear(48, 64, torch.randn(48).bfloat16())
    round_to_nearest("", layer, weight)
    assert layer.bias is not None
    expected = x.float() @ layer.dequantize().T + layer.bias.float()
    assert (layer.forward_dequantized(x) - expected).norm() / expected.norm() < 0.01
    assert 0.001 < (layer.forward_scaled_mm(x) - expected).norm() / expected.norm() < 0.05
    torch.testing.assert_close(layer.dequantize(torch.tensor([5, 0, 7])), layer.dequantize()[[5, 0, 7]])
    assert (layer.dequantize() - weight).abs().max() < 0.07 * weight.abs().max()


def test_a_tied_head_is_stored_once() -> None:
    model = small("llama", tied=True)
    before = sum(p.nbytes for p in model.parameters())
    quantize(model, QuantConfig(8))
    after = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert after < 0.3 * before  # of fp32
    assert sum(1 for name, _ in model.named_buffers() if name.startswith("embed")) == 0


@pytest.mark.parametrize("optimized", [False, True])
def test_hessians_are_collected_for_every_layer(optimized: bool) -> None:
    """Also where one kernel would compute several layers."""
    model = Decoder(get_spec("llama", vocab=32, dim=32, n_layers=1, n_heads=2, context=16)).eval()
    if optimized:
        optimize_for_cpu(model)
    block = model.blocks[0]
    with torch.no_grad(), collect_hessians(block) as hessians:
        model(torch.arange(8)[None])
    assert hessians.keys() == {name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(hessians) == 7


def test_calibration_beats_rounding_to_nearest() -> None:
    model, other = small("llama"), small("llama")
    ids = torch.randint(100, (6, 32), generator=torch.Generator().manual_seed(0))
    layers: list[int] = []
    with torch.no_grad():
        exact = model(ids)
        calibrated = calibrate(model, QuantConfig(4, 32), ids, layers.append)(ids)
        nearest = quantize(other, QuantConfig(4, 32))(ids)
    assert layers == [1, 2]
    assert (calibrated - exact).norm() < (nearest - exact).norm()


def test_loss_of_a_trained_model(data: Path) -> None:
    """stories260k on its own samples at temperature 1."""
    llm = oneblock.load(data / "weights" / "stories260k", dtype="float32")
    drawn = llm.generate([[1]] * 8, max_tokens=200, temperature=1, seed=0, ignore_eos=True)
    ids = torch.tensor([[1, *reply.ids] for reply in drawn])

    @torch.no_grad()
    def loss(model: Decoder) -> float:
        logits = model(ids[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    before = loss(llm.model)
    quantize(llm.model, QuantConfig(8))
    assert abs(loss(llm.model) - before) < 0.004
    int4 = oneblock.load(data / "weights" / "stories260k", dtype="float32").model
    calibrate(int4, QuantConfig(4, 32), ids[:, :-1])
    assert loss(int4) - before < 0.15


# ------------------------------------------------------------------ the command, and errors


def test_the_command_and_its_report(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories, out = str(data / "weights" / "stories260k"), tmp_path / "small"
    text = str(data / "text" / "alice.txt")
    assert main(["quantize", stories, str(out), "--bits", "4", "--group", "64", "--calibrate", text]) == 0
    assert "GB in bf16" in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "Once upon a time", "--max-tokens", "8", "--temperature", "0"]) == 0
    assert "there was a" in capsys.readouterr().out
    assert main(["quantize", stories, str(tmp_path / "report"), "--report", "--text", text]) == 0
    assert "int8" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report" / "quantize.json").read_text())
    assert [row["name"] for row in rows][:2] == ["bf16", "int8"]
    assert rows[1]["divergence"] < rows[3]["divergence"]
    assert (tmp_path / "report" / "quantize.png").stat().st_size > 10_000


def test_a_quantized_folder_is_refused_for_training(tmp_path: Path) -> None:
    LLM(quantize(small("llama"), QuantConfig(8))).save(tmp_path / "quantized")
    with pytest.raises(OneblockError, match="its weights are quantized, for inference only"):
        load_model(tmp_path / "quantized")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("norm.weight"), "'norm.weight' is missing; quantize the original model again"),
        (lambda x: x.update(more=torch.zeros(1)), "'more' has no place in this model"),
        (lambda x: x.update({"norm.weight": torch.zeros(3)}), r"'norm.weight' has shape \[3\], not \[64\]"),
    ],
)
def test_a_damaged_quantized_folder_is_refused(change, message: str, tmp_path: Path) -> None:
    LLM(quantize(small("llama"), QuantConfig(8))).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(OneblockError, match=message):
        oneblock.load(tmp_path)


def test_wrong_options_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ({"bits": 4, "fp8": True}, "fp8 with 4 bits: fp8 has 8 bits"),
        ({"bits": 3}, "weights in 3 bits: choose 8 or 4"),
        ({"bits": 4, "group": 48}, "int4 groups of 48 columns: choose 32, 64 or 128"),
    ):
        with pytest.raises(OneblockError, match=message):
            QuantConfig(**options)  # type: ignore[arg-type]
    for flags, message in (
        (["--bits", "4", "--fp8"], "fp8 with 4 bits"),
        (["--bits", "8", "--calibrate", "x"], "--calibrate is for int4, not int8"),
        (["--report"], "--report needs a text"),
        (["--bits", "4", "--calibrate", "none.txt"], "none.txt: no such text file"),
    ):
        assert main(["quantize", str(data / "weights" / "stories260k"), str(tmp_path / "out"), *flags]) == 1
        assert message in capsys.readouterr().err


def test_the_input_is_never_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLM(small("llama")).save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for out in ("model", "link", "model/../model"):
        assert main(["quantize", str(tmp_path / "model"), str(tmp_path / out)]) == 1
        assert "is the input, which would be overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_quantized_weights_are_not_quantized_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLM(small("llama")).save(tmp_path / "model")
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "int8")]) == 0
    capsys.readouterr()
    for flags in (["--fp8"], ["--bits", "4"], ["--bits", "8"]):
        assert main(["quantize", str(tmp_path / "int8"), str(tmp_path / "again"), *flags]) == 1
        assert "already int8; quantize the original model" in capsys.readouterr().err
        assert not (tmp_path / "again").exists()


def test_a_format_that_fits_no_matrix_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLM(small("llama", dim=96, hidden_dim=160)).save(tmp_path / "model")
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--bits", "4", "--group", "128"]) == 1
    assert "int4, group 128 fits no matrix of the model (in_features 160 is not divisible" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_matrices_that_stay_are_printed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLM(small("mixtral", hidden_dim=96)).save(tmp_path / "model")
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--bits", "4", "--group", "64"]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.mlp.experts, blocks.1.mlp.experts stay in bf16: in_features 96 is not divisible by 64" in printed
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (recorded["bits"], recorded["group"]) == (4, 64)
    assert recorded["unquantized"]["blocks.1.mlp.experts"] == "in_features 96 is not divisible by 64"
    assert recorded["unquantized"]["blocks.1.mlp.router"] == "routing stays in full precision"
    model = oneblock.load(tmp_path / "out").model
    plain = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Experts)}
    assert plain == recorded["unquantized"].keys()


def test_an_older_quantized_folder_says_what_to_do(tmp_path: Path) -> None:
    LLM(quantize(small("llama"), QuantConfig(8))).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OneblockError, match=r"in quantized format 1, not 2; quantize the original model again"):
        oneblock.load(tmp_path)


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    LLM(small("llama")).save(tmp_path / "model")

    def fail(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("oneblock.store.save.save_file", fail)
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ mixture of experts


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("config", [QuantConfig(8), QuantConfig(4, 32), QuantConfig(8, fp8=True)], ids=str)
def test_quantized_experts_compile(config: QuantConfig) -> None:
    """As one graph, also for a copy of the module, whose weights are its own."""
    experts: Any = quantize(small("mixtral"), config).blocks[0].mlp.experts
    x, expert = torch.randn(6, 64), torch.tensor([0, 0, 2, 3, 3, 3])
    for module in (experts, copy.deepcopy(experts)):
        if module is not experts:
            module.up[0].scale.mul_(2)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(module, fullgraph=True)(x, expert), module(x, expert))
