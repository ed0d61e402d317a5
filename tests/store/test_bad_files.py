"""Damaged, mismatched and unsafe files: every error is one line with the file, the tensor and the fix."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.spec import FAMILIES
from oneblock.store import load_model, save_model
from oneblock.store.tensors import build_header, read_header

TINY = FAMILIES["llama"](vocab=11, dim=8, n_heads=2, n_layers=1, hidden_dim=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(tmp_path / "model", Decoder(TINY))
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(OneblockError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of the weight file, not its data."""
    raw = weights(folder).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


# ------------------------------------------------------------------ headers


@pytest.mark.parametrize("size", [0, 5, 8, 9, 200, -1, -100])
def test_truncated_files(folder: Path, size: int) -> None:
    raw = weights(folder).read_bytes()
    weights(folder).write_bytes(raw[:size])
    message = refusal(folder)
    assert "model.safetensors: " in message
    assert message.endswith("download it again")


def test_bytes_after_the_end(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes() + b"more")
    assert "file not fully covered" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**63, 2**64 - 1])
def test_impossible_header_lengths(folder: Path, length: int) -> None:
    weights(folder).write_bytes(struct.pack("<Q", length) + weights(folder).read_bytes()[8:])
    message = refusal(folder)
    assert "model.safetensors: Error while deserializing header: " in message
    assert message.endswith("the file is damaged or incomplete; download it again")


def test_a_bit_flip_in_the_header_is_refused_or_harmless(folder: Path) -> None:
    """Every bit of the header; flips in unused metadata and in white space are harmless."""
    raw = bytearray(weights(folder).read_bytes())
    entries = read_header(weights(folder))
    (length,) = struct.unpack("<Q", raw[:8])
    harmless = 0
    for bit in range(8 * (8 + length)):
        raw[bit // 8] ^= 1 << bit % 8
        weights(folder).write_bytes(raw)
        try:
            found = read_header(weights(folder))
        except OneblockError as error:
            assert str(weights(folder)) in str(error)
            assert "\n" not in str(error)
        else:
            if found == entries:
                harmless += 1
            else:
                refusal(folder)
        raw[bit // 8] ^= 1 << bit % 8
    assert harmless < 0.05 * 8 * length


def shaped(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda header: change(header["model.norm.weight"])


HEADERS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (shaped(lambda t: t.update(data_offsets=[2080, 2112])), "invalid offset for tensor `model.norm.weight`"),
    (shaped(lambda t: t.update(data_offsets=[0, 32])), "invalid offset for tensor `"),
    (shaped(lambda t: t.update(data_offsets=[-32, 0])), "invalid value: integer `-32`, expected usize"),
    (shaped(lambda t: t.update(data_offsets=[0])), "expected a tuple of size 2"),
    (shaped(lambda t: t.update(shape=[9])), "invalid shape, data type, or offset for tensor"),
    (shaped(lambda t: t.update(shape=[2**40, 2**40])), "overflow computing buffer size"),
    (shaped(lambda t: t.update(shape=[8.0])), "invalid type: floating point `8.0`, expected usize"),
    (shaped(lambda t: t.update(shape=[True, 8])), "invalid type: boolean `true`, expected usize"),
    (shaped(lambda t: t.update(dtype="F31")), "unknown variant `F31`"),
    (shaped(lambda t: t.update(dtype=["F32"])), "invalid type: sequence"),
    (shaped(lambda t: t.pop("shape")), "missing field `shape`"),
    (lambda header: header.update({"x": 3}), "expected struct TensorInfo"),
    (lambda header: header.pop("model.norm.weight"), "invalid offset for tensor `"),
]


@pytest.mark.parametrize(("change", "message"), HEADERS, ids=[message for _, message in HEADERS])
def test_headers_that_do_not_match_the_file(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, change)
    assert message in refusal(folder)


def test_headers_that_are_not_json_objects(folder: Path) -> None:
    for text in (b"[]", b"{ ", b"\xff\xff", b"[" * 50_000):
        weights(folder).write_bytes(struct.pack("<Q", len(text)) + text)
        assert "invalid JSON in header" in refusal(folder) or "invalid UTF-8 in header" in refusal(folder)


# ------------------------------------------------------------------ tensors


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(weights(folder)).items()}
    change(tensors)
    save_file(tensors, weights(folder))


UP = "model.layers.0.mlp.up_proj.weight"
TENSORS: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda t: t.pop(UP), f"tensor '{UP}' is missing; the weights are incomplete"),
    (lambda t: (t.pop(UP), t.pop("lm_head.weight")), "is missing (and 1 more)"),
    (lambda t: t.update({"model.extra": torch.ones(1)}), "tensor 'model.extra' has no place in this model"),
    (
        lambda t: t.update({UP: torch.ones(8, 9)}),
        f"tensor '{UP}' has shape [8, 9], but the configuration requires [8, 8]",
    ),
    (lambda t: t.update({UP: torch.ones(64)}), "has shape [64]"),
    (
        lambda t: t.update({UP: torch.ones(8, 8, dtype=torch.int32)}),
        f"tensor '{UP}' is I32, which is not supported here; get the model in one of F64, F32",
    ),
    (
        lambda t: t.update({UP: torch.ones(8, 8).to(torch.float8_e4m3fn)}),
        f"tensor '{UP}' is F8_E4M3, which is not supported here",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[message for _, message in TENSORS])
def test_tensors_that_do_not_match_the_configuration(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    rewrite(folder, change)
    assert message in refusal(folder)


def test_a_configuration_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    assert "but the configuration requires [11, 16]" in refusal(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "tensor 'model.layers.1." in refusal(folder)


# ------------------------------------------------------------------ folders


def test_folders_without_weights(folder: Path) -> None:
    weights(folder).unlink()
    assert "has no model.safetensors and no model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(folder / "exploded").write_text, ("boom",))

    weights(folder).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    message = refusal(folder)
    assert f"{name} is a pickle, which could run code" in message
    assert f"from_pretrained('{folder}').save_pretrained('converted')" in message
    assert not (folder / "exploded").exists()


def sharded(tmp_path: Path) -> Path:
    save_model(tmp_path / "shards", Decoder(TINY), max_shard_size=700)
    return tmp_path / "shards"


def index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    change(value["weight_map"])
    path.write_text(json.dumps(value))


def test_indexes_that_do_not_match_the_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    first = next(iter(sorted(folder.glob("*.safetensors"))))
    for bad in ("../model.safetensors", "/etc/passwd", 3):
        index(folder, lambda names, bad=bad: names.update({"model.norm.weight": bad}))
        assert "has no weight_map of tensors to files in this folder" in refusal(folder)
    folder = sharded(tmp_path)
    index(folder, lambda names: names.update({"model.norm.bias": first.name}))
    assert f"{first.name}: tensor 'model.norm.bias' is missing, but" in refusal(folder)
    folder = sharded(tmp_path)
    (folder / "model-00002-of-00001.safetensors").write_bytes(first.read_bytes())
    index(folder, lambda names: names.update({"x": "model-00002-of-00001.safetensors"}))
    assert "is in" in refusal(folder)
    folder = sharded(tmp_path)
    first.unlink()
    assert f"{first.name}: is missing, but model.safetensors.index.json names it" in refusal(folder)


def test_a_file_that_shrinks_after_its_header_was_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oneblock.store import load

    def cut(path: Path) -> Any:
        entries = read_header(path)
        path.write_bytes(path.read_bytes()[:-50])
        return entries

    monkeypatch.setattr(load, "read_header", cut)
    with pytest.raises(OneblockError, match="ends inside tensor"):
        load_model(folder, dtype="float64")


def test_the_safetensors_library_reads_our_files(folder: Path) -> None:
    assert set(load_file(weights(folder))) == set(read_header(weights(folder)))
    header = build_header({"a": (torch.float32, (3,)), "b": (torch.bfloat16, ())})
    (length,) = struct.unpack("<Q", header[:8])
    assert (8 + length) % 8 == 0
