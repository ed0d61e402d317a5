"""Fewer bits: codes, folders of them, and what they cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import oneblock
from oneblock.cli import main
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.kernels.cpu_modules import optimize_for_cpu
from oneblock.model import Decoder, init_weights
from oneblock.quant.formats import (
    QuantParams,
    fit_quant_params,
    packed,
    quantize_int4,
    quantize_int8,
    scale_of,
    unpacked,
)
from oneblock.quant.gptq import calibrate, corrected, products
from oneblock.quant.linear import Float8Linear, QuantizedLinear
from oneblock.quant.quantize import QuantConfig, QuantizedExperts, nearest, quantize
from oneblock.spec import get_spec
from oneblock.store import load_model


def small(family: str, **sizes: int) -> Decoder:
    sizes = {"vocab": 100, "dim": 64, "n_layers": 2, "n_heads": 2, "context": 64, **sizes}
    model = Decoder(get_spec(family, **sizes))
    init_weights(model, 0)
    return model.eval()


# ------------------------------------------------------------------ codes


@pytest.mark.parametrize(("bits", "columns"), [(8, 12), (4, 24)])
def test_packing_is_undone(bits: int, columns: int) -> None:
    codes = torch.randint(1 << bits, (37, columns), dtype=torch.uint8)
    tiles = packed(codes, bits)
    rows = torch.cat([unpacked(tiles[t, :, lane][None], bits) for t in range(3) for lane in range(16)])
    assert torch.equal(rows[:37], codes)


def test_codes_are_near() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 128)
    eight = QuantizedLinear(40, 128, 0)
    eight.fill(*quantize_int8(weight))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((eight.rows() - weight).abs() <= step * 0.5001).all()
    errors = []
    for group in (32, 64, 128):
        four = QuantizedLinear(40, 128, group)
        four.fill(*quantize_int4(weight, group))
        errors.append((four.rows() - weight).norm() / weight.norm())
        assert torch.equal(four.rows(torch.tensor([3, 39])), four.rows()[[3, 39]])
    assert errors[0] < errors[1] < errors[2] < 0.12


WEIGHTS = {
    "as they come": lambda w: w,
    "tiny": lambda w: w * 1e-9,
    "rows of all sizes": lambda w: w * torch.logspace(-4, 4, 32)[:, None],
    "a column far larger": lambda w: w * torch.where(torch.arange(256) == 7, 50.0, 1.0),
    "above zero": lambda w: w.abs() + 2,
    "below zero": lambda w: -w.abs() - 2,
    "nothing": torch.zeros_like,
}


def exact(weight: torch.Tensor, shrink: float) -> torch.Tensor:
    """The error of each group of 64 when its range is held in full."""
    groups = weight.unflatten(1, (-1, 64))
    low, high = (x[..., None] * shrink for x in (groups.amin(-1), groups.amax(-1)))
    step = ((high - low) / 15).clamp(min=1e-30)
    return (((groups - low) / step).round().clamp(0, 15) * step + low - groups).square().sum(-1)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_ranges_lose_little_in_8_bits(kind: str) -> None:
    """Beside the loss of 4 bits whose ranges are held in full."""
    torch.manual_seed(0)
    weight = WEIGHTS[kind](torch.randn(32, 256))
    codes, found = quantize_int4(weight, 64)
    wrong = (found.numbers(codes.unflatten(1, (-1, 64))).flatten(1) - weight).norm()
    best = torch.stack([exact(weight, shrink) for shrink in torch.linspace(1, 0.64, 10).tolist()]).amin(0)
    assert wrong <= (1.7 if kind == "below zero" else 1.03) * best.sum().sqrt()  # such groups' codes reach up to zero
    for whole in (found.factor, found.zero):
        assert torch.equal(whole, whole.to(torch.uint8).float())


def test_large_weights_become_codes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 128)
    scale = scale_of(weight, 64, 1.1)
    groups = weight.unflatten(1, (-1, 64))

    def given(rows: slice) -> tuple[torch.Tensor, QuantParams]:
        found = fit_quant_params(groups[rows], scale[rows])
        return found.codes(groups[rows]).flatten(1), found

    (codes, found), (own, given_found) = quantize_int4(weight, 64), given(slice(0, 20))
    monkeypatch.setattr("oneblock.quant.formats.PART", 128 * 6)
    part, part_found = given(slice(6, 12))
    assert torch.equal(part, own[6:12])
    assert torch.equal(
        part_found.numbers(part.unflatten(1, (-1, 64))), given_found.numbers(own.unflatten(1, (-1, 64)))[6:12]
    )
    parts, again = quantize_int4(weight, 64)
    assert torch.equal(parts, codes)
    assert torch.equal(again.numbers(parts.unflatten(1, (-1, 64))), found.numbers(codes.unflatten(1, (-1, 64))))


def test_calibrated_codes_are_nearer_where_it_counts() -> None:
    """On inputs that are not all alike, the products are closer though the weights are not."""
    torch.manual_seed(0)
    x = torch.randn(500, 128) @ torch.randn(128, 128) * torch.rand(128) ** 3
    weight = torch.randn(50, 128)

    def product(codes: torch.Tensor, found: QuantParams) -> torch.Tensor:
        layer = QuantizedLinear(50, 128, 64)
        layer.fill(codes, found)
        return x @ layer.rows().T

    def wrong(y: torch.Tensor) -> float:
        return ((y - x @ weight.T).norm() / (x @ weight.T).norm()).item()

    assert wrong(product(*corrected(weight, x.T @ x, 64))) < 0.8 * wrong(product(*quantize_int4(weight, 64)))


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("bits", [QuantConfig(8), QuantConfig(4, 32), QuantConfig(8, fp8=True)], ids=["8", "4", "fp8"])
def test_a_folder_says_what_was_saved(family: str, bits: QuantConfig, tmp_path: Path) -> None:
    model = small(family)
    ids = torch.randint(100, (2, 12))
    with torch.no_grad():
        exact = model(ids)
        found = quantize(model, bits)(ids)
    assert any(isinstance(m, Float8Linear if bits.fp8 else QuantizedLinear) for m in model.modules())
    assert (family in ("mixtral", "gpt_oss")) == any(isinstance(m, QuantizedExperts) for m in model.modules())
    assert (found - exact).norm() / exact.norm() < (0.5 if bits.bits == 4 else 0.15 if bits.fp8 else 0.05)
    LLM(model, generation_config={"temperature": 0.5}).save(tmp_path / "coded")
    back = oneblock.load(tmp_path / "coded")
    assert back.generation == {"temperature": 0.5}
    with torch.no_grad():
        assert torch.equal(back.model(ids), found)
    assert back.spec == model.spec


def test_products_of_floats_with_activations_in_floats() -> None:
    """What GPUs do, by torch's CPU form of the same operator."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(2, 3, 64).bfloat16()
    layer = Float8Linear(48, 64, torch.randn(48).bfloat16())
    nearest("", layer, weight)
    assert layer.bias is not None
    expected = x.float() @ layer.rows().T + layer.bias.float()
    assert (layer.plain(x) - expected).norm() / expected.norm() < 0.01
    assert 0.001 < (layer.direct(x) - expected).norm() / expected.norm() < 0.05
    torch.testing.assert_close(layer.rows(torch.tensor([5, 0, 7])), layer.rows()[[5, 0, 7]])
    assert (layer.rows() - weight).abs().max() < 0.07 * weight.abs().max()


def test_a_tied_head_is_held_once() -> None:
    model = small("llama", tied=True)
    before = sum(p.nbytes for p in model.parameters())
    quantize(model, QuantConfig(8))
    after = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert after < 0.3 * before  # of fp32
    assert sum(1 for name, _ in model.named_buffers() if name.startswith("embed")) == 0


@pytest.mark.parametrize("ready", [False, True])
def test_what_every_layer_multiplies_is_seen(ready: bool) -> None:
    """Of a model made ready for a CPU, too, where one product does several layers."""
    model = Decoder(get_spec("llama", vocab=32, dim=32, n_layers=1, n_heads=2, context=16)).eval()
    if ready:
        optimize_for_cpu(model)
    block = model.blocks[0]
    before = [(vars(m).keys()) for m in block.modules()]
    with torch.no_grad(), products(block) as sums:
        model(torch.arange(8)[None])
    assert sums.keys() == {name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(sums) == 7
    assert [(vars(m).keys()) for m in block.modules()] == before


def test_calibration_goes_through_every_layer() -> None:
    model, other = small("llama"), small("llama")
    ids = torch.randint(100, (6, 32))
    seen: list[int] = []
    with torch.no_grad():
        exact = model(ids)
        found = calibrate(model, QuantConfig(4, 32), ids, seen.append)(ids)
        nearest = quantize(other, QuantConfig(4, 32))(ids)
    assert seen == [1, 2]
    assert (found - exact).norm() < (nearest - exact).norm()


def test_real_weights_lose_little(data: Path) -> None:
    """stories260k on stories of its own, drawn at temperature 1."""
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
    four = oneblock.load(data / "weights" / "stories260k", dtype="float32").model
    calibrate(four, QuantConfig(4, 32), ids[:, :-1])
    assert loss(four) - before < 0.15  # 260 thousand weights have none to spare


# ------------------------------------------------------------------ the command, and what goes wrong


def test_the_command_and_its_report(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories, out = str(data / "weights" / "stories260k"), tmp_path / "small"
    text = str(data / "text" / "alice.txt")
    assert main(["quantize", stories, str(out), "--bits", "4", "--group", "64", "--calibrate", text]) == 0
    assert "GB in bf16" in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "Once upon a time", "--max-tokens", "8", "--temperature", "0"]) == 0
    assert "there was a" in capsys.readouterr().out
    assert main(["quantize", stories, str(tmp_path / "report"), "--report", "--text", text]) == 0
    assert "8 bits" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report" / "quantize.json").read_text())
    assert [row["name"] for row in rows][:2] == ["bf16", "8 bits"]
    assert rows[1]["divergence"] < rows[3]["divergence"]
    assert (tmp_path / "report" / "quantize.png").stat().st_size > 10_000


def test_a_quantised_folder_is_not_loaded_to_be_trained(tmp_path: Path) -> None:
    LLM(quantize(small("llama"), QuantConfig(8))).save(tmp_path / "coded")
    with pytest.raises(OneblockError, match="its weights are quantised, to generate with only; give the model it was"):
        load_model(tmp_path / "coded")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.pop("norm.weight"), "'norm.weight' is missing: quantize the model again"),
        (lambda x: x.update(more=torch.zeros(1)), "'more' has no place in this model"),
        (lambda x: x.update({"norm.weight": torch.zeros(3)}), r"'norm.weight' has shape \[3\], not \[64\]"),
    ],
)
def test_a_wrong_folder_is_refused(change, said: str, tmp_path: Path) -> None:
    LLM(quantize(small("llama"), QuantConfig(8))).save(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    change(held)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(OneblockError, match=said):
        oneblock.load(tmp_path)


def test_bits_that_are_not_known(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in (
        (["--bits", "4", "--fp8"], "floats in 4 bits: there are only those of 8"),
        (["--bits", "3"], "weights in 3 bits: choose 8 or 4"),
        (["--bits", "4", "--group", "48"], "groups of 48: choose 32, 64 or 128"),
        (["--bits", "8", "--calibrate", "x"], "--calibrate is for 4 bits"),
        (["--report"], "--report needs a text"),
        (["--bits", "4", "--calibrate", "none.txt"], "none.txt: there is no such text file"),
    ):
        assert main(["quantize", str(data / "weights" / "stories260k"), str(tmp_path / "out"), *flags]) == 1
        assert said in capsys.readouterr().err
    shutil.rmtree(tmp_path)
