"""Loading folders: naming schemes, shards, dtypes, tied heads, memory mapping and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.spec import FAMILIES, Spec
from oneblock.store import load_model, save_model
from oneblock.store.save import write_model

Tensors = dict[str, Tensor]


def random_model(spec: Spec, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model.to(dtype)


def folder_of(tmp_path: Path, spec: Spec, dtype: torch.dtype = torch.float32) -> tuple[Path, Decoder]:
    model = random_model(spec, dtype)
    save_model(tmp_path / "model", model)
    return tmp_path / "model", model


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rename or change the folder's tensors, written by the safetensors library."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors")


def same(a: Decoder, b: Decoder) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------ memory mapping


def test_weights_are_memory_mapped(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES["llama"]())
    loaded = load_model(folder).model
    assert same(loaded, model)
    size = (folder / "model.safetensors").stat().st_size
    places = [p.data_ptr() for p in loaded.parameters()]
    assert max(places) - min(places) < size
    maps = Path("/proc/self/maps")
    if maps.exists():
        bounds = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(folder) in line]
        assert any(int(low, 16) <= min(places) and max(places) < int(high, 16) for low, high in bounds)


def test_writing_to_mapped_weights_does_not_change_the_file(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES["llama"]())
    before = (folder / "model.safetensors").read_bytes()
    first, second = load_model(folder).model, load_model(folder).model
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert same(second, model)


def test_saving_over_the_loaded_folder(tmp_path: Path) -> None:
    """The map of the replaced file stays valid."""
    folder, model = folder_of(tmp_path, FAMILIES["llama"]())
    loaded = load_model(folder)
    save_model(folder, random_model(FAMILIES["llama"](n_layers=1)))
    assert same(loaded.model, model)
    save_model(folder, loaded)
    assert same(load_model(folder).model, model)


def test_fused_tensors_are_slices_of_one_map(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES["phi3"](n_kv_heads=2))
    attn = load_model(folder).model.blocks[0].attn
    assert attn.wk.weight.data_ptr() - attn.wq.weight.data_ptr() == attn.wq.weight.nbytes
    assert same(load_model(folder).model, model)


def test_loaded_weights_train(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, FAMILIES["gpt2"](vocab=50))
    model = load_model(folder).model
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    weight = model.get_parameter("blocks.0.attn.wq.weight")
    before = weight.clone()
    model(torch.arange(9)[None]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, weight)


# ------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "llama4", "phi3"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes_are_kept_or_changed(family: str, dtype: str, tmp_path: Path) -> None:
    target = getattr(torch, dtype)
    folder, model = folder_of(tmp_path, FAMILIES[family](), target)
    kept, changed = load_model(folder), load_model(folder, dtype="float32")
    assert same(kept.model, model)
    assert kept.config["dtype"] == dtype
    assert same(changed.model, model.float())
    back = load_model(folder, dtype=torch.float64).model
    assert all(p.dtype == torch.float64 for p in back.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss"])
def test_weights_are_loaded_to_an_accelerator(family: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder, model = folder_of(tmp_path, FAMILIES[family]())
    loaded = load_model(folder, device="cuda")
    assert {p.device.type for p in loaded.model.parameters()} == {"cuda"}
    assert same(loaded.model.cpu(), model)
    save_model(tmp_path / "again", load_model(folder, "bfloat16", "cuda").model)
    assert same(load_model(tmp_path / "again").model, model.bfloat16())


def test_the_default_dtype_is_that_of_most_weights(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES["llama"](), torch.bfloat16)
    rewrite(folder, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"].float()})
    loaded = load_model(folder).model
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(loaded, model)


def test_unsupported_dtypes_are_refused(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, FAMILIES["llama"]())
    for dtype in ("int8", "float33", "Tensor"):
        with pytest.raises(OneblockError, match=f"'{dtype}' is not supported; choose one of float64"):
            load_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["mps:7", "tpu", None, "meta", 3])
def test_unavailable_devices_are_refused(device: Any, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, FAMILIES["llama"]())
    with pytest.raises(OneblockError, match=rf"^device '{device}' is not available here; available: cpu[^\n]*$"):
        load_model(folder, device=device)


# ------------------------------------------------------------------ names


def test_files_without_the_prefix_load_and_save(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES["gpt2"]())
    mask = torch.ones(1, 1, 4, 4)

    def as_first_uploaded(tensors: Tensors) -> Tensors:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return {**bare, "h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)}

    rewrite(folder, as_first_uploaded)
    loaded = load_model(folder)
    assert same(loaded.model, model)
    save_model(tmp_path / "again", loaded)
    names = set(load_file(folder / "model.safetensors")) - {"h.0.attn.bias", "h.1.attn.masked_bias"}
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma"])
def test_every_prefix_is_optional(family: str, tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES[family]())
    prefix = "gpt_neox." if family == "gpt_neox" else "model."
    rewrite(folder, lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    assert same(load_model(folder).model, model)


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES["llama"]())
    rewrite(folder, lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert same(load_model(folder).model, model)


@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize(("family", "outer"), [("gemma3", "gemma3"), ("llama4", "llama4"), ("mllama", "mllama")])
def test_the_text_model_of_an_image_text_folder(family: str, outer: str, form: str, tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES[family]())
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": outer, "text_config": text, "vision_config": {}}))

    def wrapped(tensors: Tensors) -> Tensors:
        if form == "old":
            inner = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
            return {**inner, "vision_tower.patch.weight": torch.ones(3), "multi_modal_projector.weight": torch.ones(2)}
        inner = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
        return {**inner, "model.vision_model.patch.weight": torch.ones(3)}

    rewrite(folder, wrapped)
    loaded = load_model(folder)
    assert same(loaded.model, model)
    save_model(tmp_path / "text", loaded)
    assert not [name for name in load_file(tmp_path / "text" / "model.safetensors") if "language_model" in name]
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == text["model_type"]
    assert same(load_model(tmp_path / "text").model, model)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_stored_in_stacks(family: str, tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES[family]())
    each = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}.get(family, ("mlp", "gate_proj", "up_proj", "down_proj"))

    def stacked(tensors: Tensors) -> Tensors:
        one_by_one = f"{each[0]}.experts."
        rest = {name.replace(each[0], "mlp"): t for name, t in tensors.items() if one_by_one not in name}
        for layer in range(2):
            place = f"model.layers.{layer}.{each[0]}.experts"
            gate, up, down = (torch.stack([tensors[f"{place}.{e}.{x}.weight"] for e in range(4)]) for x in each[1:])
            rest[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), 1)
            rest[f"model.layers.{layer}.mlp.experts.down_proj"] = down
        return rest

    rewrite(folder, stacked)
    loaded = load_model(folder)
    assert same(loaded.model, model)
    save_model(tmp_path / "again", loaded)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------ tied heads


def test_a_stored_head_that_is_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, FAMILIES["llama"](tied=True))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    loaded = load_model(folder)
    assert loaded.model.head.weight is loaded.model.embed.weight
    assert same(loaded.model, model)
    save_model(tmp_path / "again", loaded)
    assert "lm_head.weight" in load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_stored_head_that_differs_is_untied(dtype: str | None, tmp_path: Path) -> None:
    """transformers trusts the weights over the configuration, too."""
    folder, _ = folder_of(tmp_path, FAMILIES["llama"](tied=True))
    head = torch.randn(256, 64).bfloat16().float()
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": head})
    loaded = load_model(folder, dtype)
    assert not loaded.spec.tied
    assert loaded.model.spec == loaded.spec
    assert torch.equal(loaded.model.head.weight.float(), head)
    save_model(tmp_path / "again", loaded)
    assert not load_model(tmp_path / "again").spec.tied


# ------------------------------------------------------------------ shards and memory


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_shards(family: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES[family]())
    save_model(tmp_path / "model", model, max_shard_size=100_000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert same(load_model(tmp_path / "model").model, model)


LARGE = {  # about 300 MB in fp32 each
    "plain": FAMILIES["llama"](dim=1024, n_layers=6, hidden_dim=2816, n_heads=8),
    "transposed": FAMILIES["gpt2"](dim=1024, n_layers=6, n_heads=8),
    "stacked": FAMILIES["mixtral"](dim=512, n_layers=6, hidden_dim=1024, n_experts=8),
    "interleaved": FAMILIES["gpt_oss"](dim=512, n_layers=6, hidden_dim=1024, n_experts=8),
}
MEASURE = """
import sys, torch
from pathlib import Path
from oneblock.store import load_model
folder, small, dtype, touch = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "touch"
torch.set_num_threads(1)
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
load_model(small, dtype)  # what the first load imports and starts
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
model = load_model(folder, dtype).model
if touch:
    for p in model.parameters():
        p.detach().view(-1)[::64].sum()
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    for name, spec in LARGE.items():
        (folder / name).mkdir()
        write_model(folder / name, Decoder(spec))
    (folder / "small").mkdir()
    write_model(folder / "small", Decoder(FAMILIES["llama"]()))
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_at_most_1_1_times_the_weights(name: str, dtype: str, large: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(large / name), str(large / "small"), dtype, "touch"]
    peak, weights = (int(x) for x in subprocess.check_output(command).split())
    assert weights > 100_000_000
    assert peak < 1.1 * weights
    assert peak > 0.9 * weights, "peak memory was not measured"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_mapped_loading_takes_under_5_percent_of_the_weights(large: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(large / "plain"), str(large / "small"), "float32", "leave"]
    peak, weights = (int(x) for x in subprocess.check_output(command).split())
    assert peak < 0.05 * weights
