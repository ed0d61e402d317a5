"""Saving folders: transformers loads them, other files are kept, and a failure leaves the old folder unchanged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.spec import FAMILIES, Attention, Layer, Mlp, Positions, Rope, Spec
from oneblock.store import Checkpoint, load_model, replace_model_folder, save_model
from oneblock.store.save import write_model

TINY = FAMILIES["llama"](vocab=11, dim=8, n_heads=2, n_layers=1, hidden_dim=8)


def random_model(spec: Spec, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A saved model with a tokenizer file."""
    save_model(tmp_path / "model", Checkpoint(random_model(TINY), TINY, {}, {"temperature": 0.5}))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


# ------------------------------------------------------------------ contents


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt3"])
def test_transformers_loads_saved_models(family: str, tmp_path: Path) -> None:
    """A model created here, not a converted one: same logits."""
    transformers.logging.set_verbosity_error()
    model = random_model(FAMILIES[family](vocab=64))
    if family == "mllama":
        from oneblock.store import write_config

        config = {**write_config(model.spec), "bos_token_id": 0}  # the class wants one
        save_model(tmp_path / "m", Checkpoint(model, model.spec, config))
    else:
        save_model(tmp_path / "m", model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    theirs = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path / "m").eval()
    ids = torch.randint(0, 64, (1, 40))
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, model(ids), atol=1e-4)


def test_an_architecture_without_a_hugging_face_class(tmp_path: Path) -> None:
    attn = Attention(2, 1, 8, Rope(interleaved=True), softcap=3.0, sinks=True)
    layers = (Layer(attn, Mlp(24, "relu2", gated=False)), Layer(attn, Mlp(24, clamp=1.0), "sandwich", gated=True))
    for spec in (Spec(20, 16, 3, layers, 64), Spec(20, 16, 2, layers, 64, positions=Positions(64, "sinusoidal"))):
        model = random_model(spec)
        save_model(tmp_path / "m", model)
        loaded = load_model(tmp_path / "m")
        assert loaded.spec == spec
        assert loaded.config["model_type"] == "oneblock"
        ids = torch.arange(12)[None]
        assert torch.equal(loaded.model(ids), model(ids))


def test_gpt3_is_saved_in_our_own_format(tmp_path: Path) -> None:
    model = random_model(FAMILIES["gpt3"](n_layers=4, window=8))
    save_model(tmp_path / "m", model, max_shard_size=50_000)
    assert torch.equal(load_model(tmp_path / "m").model(torch.arange(30)[None]), model(torch.arange(30)[None]))


def test_the_configuration_must_match_the_model(old: Path) -> None:
    before = files(old)
    checkpoint = load_model(old)
    with pytest.raises(OneblockError, match="the configuration describes another model"):
        save_model(old, replace(checkpoint, model=random_model(FAMILIES["llama"]())))
    assert files(old) == before


def test_added_parameters_are_not_lost_silently(old: Path) -> None:
    model = random_model(TINY)
    model.blocks[0].attn.register_parameter("adapter", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(OneblockError, match=r"parameter 'blocks\.0\.attn\.adapter' is not the spec's"):
        save_model(old, model)


def test_a_dtype_that_cannot_be_saved(old: Path) -> None:
    before = files(old)
    model = random_model(TINY).to(torch.float8_e4m3fn)
    with pytest.raises(OneblockError, match="convert the model to bf16, fp16 or fp32 first"):
        save_model(old, model)
    assert files(old) == before


def test_the_dtype_is_recorded(old: Path) -> None:
    loaded = load_model(old, "bfloat16")
    save_model(old, loaded)
    assert json.loads((old / "config.json").read_text())["dtype"] == "bfloat16"
    (old / "config.json").write_text((old / "config.json").read_text().replace('"dtype"', '"torch_dtype"'))
    save_model(old, load_model(old, "float16"))
    config = json.loads((old / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert "dtype" not in config


# ------------------------------------------------------------------ the folder


def test_other_files_are_kept_and_old_weights_are_not(old: Path) -> None:
    (old / "notes").mkdir()
    (old / "notes" / "a.txt").write_text("kept")
    (old / "tokenizer.json").chmod(0o640)
    save_model(old, random_model(TINY, seed=1), max_shard_size=700)
    names = set(files(old))
    assert {"tokenizer.json", "notes/a.txt", "config.json", "model.safetensors.index.json"} < names
    assert not {"model.safetensors", "generation_config.json"} & names
    assert (old / "tokenizer.json").stat().st_mode & 0o777 == 0o640
    save_model(old, random_model(TINY, seed=1))
    assert set(files(old)) == {"tokenizer.json", "notes/a.txt", "config.json", "model.safetensors"}
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_foreign_safetensors_are_kept(old: Path) -> None:
    """Only the weights that the old index (or model.safetensors) names belong to the old model."""
    for max_shard_size in (700, 5_000_000):
        for name in ("adapter_model.safetensors", "embeddings.safetensors", "other.safetensors.index.json"):
            (old / name).write_bytes(b"foreign")
        save_model(old, random_model(TINY, seed=1), max_shard_size=max_shard_size)
        assert (old / "adapter_model.safetensors").read_bytes() == b"foreign"
        assert (old / "embeddings.safetensors").read_bytes() == b"foreign"
        assert (old / "other.safetensors.index.json").read_bytes() == b"foreign"
    assert not list(old.glob("model-*"))
    (old / "model.safetensors.index.json").write_text("damaged")
    save_model(old, random_model(TINY, seed=2))
    assert load_model(old).spec == TINY


def test_a_training_checkpoint_is_not_overwritten(old: Path) -> None:
    (old / "manifest.json").write_text("{}")
    before = files(old)
    with pytest.raises(OneblockError, match=r"is a training checkpoint .* manifest\.json would no longer match"):
        save_model(old, random_model(TINY, seed=1))
    assert files(old) == before


def test_parent_folders_are_created_and_links_followed(tmp_path: Path) -> None:
    save_model(tmp_path / "a" / "b", random_model(TINY))
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    save_model(tmp_path / "link", random_model(TINY, seed=1))
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(load_model(tmp_path / "a" / "b").model.embed.weight, random_model(TINY, seed=1).embed.weight)


def test_folders_that_are_not_models_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home" / "pictures").mkdir(parents=True)
    with pytest.raises(OneblockError, match=r"holds folders and no config\.json"):
        save_model(tmp_path / "home", random_model(TINY))
    (tmp_path / "file").write_text("")
    with pytest.raises(OneblockError, match="is a file; choose a folder"):
        save_model(tmp_path / "file", random_model(TINY))
    assert set(files(tmp_path)) == {"file"}


def test_a_model_and_its_tokenizer_change_together(old: Path) -> None:
    before = files(old)
    with pytest.raises(RuntimeError, match="tokenizer"), replace_model_folder(old) as new:
        write_model(new, random_model(TINY, seed=1))
        (new / "tokenizer.json").write_text("half")
        raise RuntimeError("no tokenizer")
    assert files(old) == before
    with replace_model_folder(old) as new:
        write_model(new, random_model(TINY, seed=1))
        (new / "tokenizer.json").write_text("whole")
    assert (old / "tokenizer.json").read_text() == "whole"
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_folders_are_exchanged_without_renameat2(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three renames instead of one."""
    from oneblock import files as module

    monkeypatch.setattr(module, "_rename_exchange", lambda a, b: False)
    new = old.with_name("new")
    new.mkdir()
    (new / "x").write_text("x")
    module.exchange_folders(new, old)
    assert set(files(old)) == {"x"}
    assert "tokenizer.json" in files(new)
    assert sorted(path.name for path in old.parent.iterdir()) == ["model", "new"]


# ------------------------------------------------------------------ failures

SAVE = """
import sys, torch, resource
from oneblock.errors import OneblockError
from oneblock.model import Decoder
from oneblock.spec import FAMILIES
from oneblock.store import save_model
torch.manual_seed(1)
model = Decoder(FAMILIES["llama"](vocab=11, dim=8, n_heads=2, n_layers=1, hidden_dim=8))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save_model(sys.argv[1], model, max_shard_size=1500)
except OneblockError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
@pytest.mark.parametrize("limit", [0, 100, 900, 1500])
def test_a_failed_write_leaves_the_old_folder(old: Path, limit: int) -> None:
    """A limit on file sizes fails in the header, in a tensor, and in a later shard."""
    before = files(old)
    run = subprocess.run([sys.executable, "-c", SAVE, str(old), str(limit)], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert run.stdout.count("\n") == 1
    assert f"{old}: could not be written (File too large); free disk space or choose another path" in run.stdout
    assert files(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["model"]
    run = subprocess.run([sys.executable, "-c", SAVE, str(old), str(10**6)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert files(old) != before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_folder(small_disk: Path) -> None:
    save_model(small_disk / "model", random_model(TINY))
    before = files(small_disk)
    with pytest.raises(OneblockError, match=r"could not be written \(No space left on device\)"):
        save_model(small_disk / "model", random_model(FAMILIES["llama"]()))
    assert files(small_disk) == before
    assert load_model(small_disk / "model").spec == TINY


def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    with pytest.raises(OneblockError, match="could not be written"):
        save_model("/proc/nothing/model", random_model(TINY))


KILLED = SAVE.replace(
    "resource.setrlimit(",
    """
import os, time, oneblock.store.save as save
write_weights = save.write_weights
def slow(*args):
    write_weights(*args)
    print("written", flush=True)
    time.sleep(60)
save.write_weights = slow
(lambda *a: None)(""",
)


def test_a_killed_process_leaves_the_old_folder_and_its_temporary_one_is_removed(old: Path) -> None:
    before = files(old)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(old), "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert files(old) == before
    assert len(list(old.parent.iterdir())) == 2
    save_model(old, random_model(TINY, seed=3))
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_the_folder_exists_at_every_moment(old: Path) -> None:
    """Read while another process saves 40 times."""
    code = SAVE.replace("resource.setrlimit(", "(lambda *a: None)(").replace(
        "    save_model(", "    for _ in range(40): save_model("
    )
    with subprocess.Popen([sys.executable, "-c", code, str(old), "0"]) as process:
        reads, end = 0, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            assert (old / "config.json").exists()
            reads += 1
    assert process.returncode == 0
    assert reads > 10
    assert isinstance(load_model(old), Checkpoint)
