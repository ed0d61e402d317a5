"""Text to token shards and back: every source, killed jobs, damage, mixtures that do not fit."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oneblock.cli import main
from oneblock.data import documents
from oneblock.data.documents import DocumentFormat
from oneblock.data.prepare import PrepareOptions, is_held_out, prepare_shards
from oneblock.data.shards import read_shard_folder, read_shard_folders
from oneblock.data.tokens import id_dtype
from oneblock.errors import OneblockError
from oneblock.infer.llm import load
from oneblock.store import manifest
from oneblock.text.train import byte_level, train_bpe

TEXTS = [f"Document {i}: {'words ' * (i % 9)}and an end." for i in range(200)]


def lines(path: Path, texts: list[str] = TEXTS, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def settings(*sources: Path | str, **changes: object) -> PrepareOptions:
    return PrepareOptions(tuple(map(str, sources)), **changes)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def contents(folder: Path) -> list[str]:
    """The documents of a prepared folder, decoded."""
    found = read_shard_folder(folder)
    ids, tokenizer = found.open(), found.tokenizer
    assert ids.ends is not None
    bounds = zip([0, *ids.ends[:-1]], ids.ends, strict=True)
    return [tokenizer.decode(ids.read(int(a), int(b - a)).tolist()) for a, b in bounds]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# ------------------------------------------------------------------ sources


def test_every_source_gives_its_documents(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("first<|>second<|>third")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines(tmp_path / "b.jsonl").read_bytes()))
    sources = (plain, tmp_path / "b.jsonl", packed)
    prepare_shards(settings(*sources, layout=DocumentFormat(separator="<|>")), byte_level(), tmp_path / "out", 1)
    assert contents(tmp_path / "out") == ["first", "second", "third", *TEXTS, *TEXTS]
    assert read_shard_folder(tmp_path / "out").documents == 403


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": TEXTS, "n": list(range(200))}), tmp_path / "a.parquet")
    prepare_shards(settings(tmp_path / "a.parquet", layout=DocumentFormat("body")), byte_level(), tmp_path / "out", 1)
    assert contents(tmp_path / "out") == TEXTS
    with pytest.raises(OneblockError, match="no text in 'text'"):
        prepare_shards(settings(tmp_path / "a.parquet"), byte_level(), tmp_path / "other", 1)


@pytest.mark.filterwarnings("ignore")  # of that library's own
def test_a_data_set_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the library for data sets by name is not installed")
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl")
    prepare_shards(settings(f"hf:{tmp_path / 'set'}"), byte_level(), tmp_path / "out", 1)
    assert contents(tmp_path / "out") == TEXTS
    with pytest.raises(OneblockError, match="cannot open the data set"):
        prepare_shards(settings(f"hf:{tmp_path / 'set'}:default:test"), byte_level(), tmp_path / "other", 1)


def test_in_parallel_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK", 500)
    source = lines(tmp_path / "a.jsonl")
    for workers in (1, 3):
        prepare_shards(settings(source, shard_tokens=1000), byte_level(), tmp_path / f"out{workers}", workers)
    assert files(tmp_path / "out1") == files(tmp_path / "out3")
    assert len(list((tmp_path / "out1").glob("*.bin"))) > 3


def test_documents_are_held_out_by_their_number(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    made = settings(source, val_share=0.2, seed=3, shard_tokens=500)
    prepare_shards(made, byte_level(), tmp_path / "out", 1)
    expected = [text for i, text in enumerate(TEXTS) if is_held_out(i, made)]
    assert 20 < len(expected) < 60
    assert contents(tmp_path / "out" / "val") == expected
    assert contents(tmp_path / "out") == [text for text in TEXTS if text not in expected]


def test_the_end_of_text_follows_each_document(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    prepare_shards(settings(lines(tmp_path / "a.jsonl")), tokenizer, tmp_path / "out", 1)
    ids = read_shard_folder(tmp_path / "out").open()
    assert ids.ends is not None
    assert set(ids.gather_rows(ids.ends - 1, 1)[:, 0]) == {tokenizer.eos_ids[0]}


# ------------------------------------------------------------------ killed, damaged

SLOW = """
import sys, time
from pathlib import Path
from oneblock.data.prepare import PrepareOptions, prepare_shards
from oneblock.text.train import byte_level
source, out = sys.argv[1:]
def report(documents, tokens):
    if documents % 10 == 0:
        time.sleep(0.02)
        print(documents, flush=True)
prepare_shards(PrepareOptions((source,), shard_tokens=900, val_share=0.1), byte_level(), Path(out), 1, report)
"""


@pytest.mark.parametrize("after", [30, 110, 190])
def test_a_killed_job_goes_on_to_the_same_bytes(after: int, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    argv = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= after:
                process.send_signal(signal.SIGKILL)
                break
    assert not (tmp_path / "out" / manifest.MANIFEST).exists()
    with pytest.raises(OneblockError, match="begun with other files or options"):
        prepare_shards(settings(source, shard_tokens=901, val_share=0.1), byte_level(), tmp_path / "out", 1)
    counted: list[int] = []
    made = settings(source, shard_tokens=900, val_share=0.1)
    prepare_shards(made, byte_level(), tmp_path / "out", 1, lambda documents, tokens: counted.append(documents))
    assert len(counted) < 200  # what was done is not done again
    prepare_shards(made, byte_level(), tmp_path / "whole", 1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    with pytest.raises(OneblockError, match="prepared already"):
        prepare_shards(made, byte_level(), tmp_path / "out", 1)


def test_damage_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prepare_shards(settings(lines(tmp_path / "a.jsonl"), shard_tokens=1000), byte_level(), out, 1)
    assert main(["data", "verify", str(out)]) == 0
    shard = out / "shard-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    assert "shard-00001.bin is damaged" in fails(["data", "verify", str(out)], capsys)
    shard.write_bytes(whole[:-2])
    with pytest.raises(OneblockError, match=r"shard-00001.bin is missing or truncated"):
        read_shard_folder(out).open()
    (out / manifest.MANIFEST).write_text("{}")
    assert "manifest.json is damaged" in fails(["data", "show", str(out)], capsys)


# ------------------------------------------------------------------ learning from them

TINY = ["--dim", "16", "--n-layers", "1", "--n-heads", "2", "--context", "24", "--batch-size", "4"]
TINY += ["--dtype", "float32"]
QUICK = [*TINY, "--steps", "4", "--warmup", "1", "--no-tensorboard", "--sample-tokens", "4"]


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with one tokenizer; the second keeps documents for validation."""
    for name, share in (("a", 0.0), ("b", 0.2)):
        prepare_shards(settings(lines(tmp_path / f"{name}.jsonl"), val_share=share), byte_level(), tmp_path / name, 1)
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_run_learns_from_a_mixture(workers: str, prepared: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = ["--data", *map(str, prepared), "--weights", "0.7", "0.3", "--documents", "--workers", workers]
    assert main(["train", *argv, "--out", str(run), *QUICK]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val" in row for row in rows)
    assert load(run / "latest").tokenizer is not None
    assert main(["train", "--resume", str(run), "--steps", "6"]) == 0


def test_what_does_not_fit_is_refused(
    prepared: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = map(str, prepared)
    other = tmp_path / "other"
    prepare_shards(settings(tmp_path / "a.jsonl"), train_bpe(TEXTS, 300), other, 1)
    text = tmp_path / "text.txt"
    text.write_text("some text")

    def error_of(*argv: str) -> str:
        return fails(["train", *argv, *QUICK], capsys)

    mixed = error_of("--data", a, str(other))
    assert "different tokenizers" in mixed and "256 tokens" in mixed and "300" in mixed
    assert "another tokenizer (256 tokens)" in error_of("--data", a, "--tokenizer", str(other / "tokenizer"))
    assert "3 weights for 2 data sources" in error_of("--data", a, b, "--weights", "1", "1", "1")
    assert "is prepared data" in error_of("--data", a, str(text))
    assert "--weights are for" in error_of("--data", str(text), "--weights", "1")
    assert "all 0" in error_of("--data", a, b, "--weights", "0", "0")


@pytest.mark.parametrize(
    ("content", "argv", "message"),
    [
        ('{"text": "a"}\n{"text": ""}\n', [], "document 2 is empty"),
        ('{"text": "a"}\n{"body": "b"}\n', [], "line 2 has no text in 'text' (it has body)"),
        ('{"text": "a"}\nno\n', [], "line 2 is not valid JSON"),
        ('{"text": ""}\n', ["--skip-empty"], "no documents to train on"),
        ('{"text": "a"}\n', ["--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_bad_sources(
    content: str, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    base = ["data", "prepare", "--data", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--workers", "1"]
    assert message in fails([*base, "--out", str(tmp_path / "out"), *argv], capsys)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("shard-tokens", "0"), ("workers", "-1"), ("workers", "99999"), ("val-share", "1.0")],
        *[("val-share", "nan"), ("seed", "-1"), ("seed", str(2**63))],
    ],
)
def test_numbers_out_of_range(flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["data", "prepare", "--data", "a.txt", "--tokenizer", "bytes", "--out", str(tmp_path / "o")]
    assert main([*argv, f"--{flag}", value]) == 2
    assert f"{flag.replace('-', '_')} is {value}, but it must be" in capsys.readouterr().err
    with pytest.raises(OneblockError, match="must be"):
        if flag == "workers":
            prepare_shards(settings("a.txt"), byte_level(), tmp_path / "o", int(value) if value != "-1" else 0)
        settings("a.txt", **{flag.replace("-", "_"): float(value) if flag == "val-share" else int(value)})


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean show?" in fails(["data", "shwo"], capsys)
    assert "needs --data FILES" in fails(["data", "prepare"], capsys)
    assert "needs a folder" in fails(["data", "show"], capsys)
    assert "has no prepared data" in fails(["data", "verify", str(tmp_path)], capsys)
    argv = ["data", "prepare", "--data", str(tmp_path / "no.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "o")]
    assert "cannot read" in fails(argv, capsys)


def test_show(prepared: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(prepared[0])]) == 0
    out = capsys.readouterr().out
    assert "200 documents" in out and "'Document 0:" in out
    assert main(["data", "show", str(prepared[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 200


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert id_dtype(65_536) == "uint16"
    assert id_dtype(65_537) == "uint32"
    found, tokenizer = read_shard_folders([_made(tmp_path)])
    assert found[0].vocab == tokenizer.vocab_size
    assert found[0].open().parts[0].dtype == np.dtype("uint16")


def _made(tmp_path: Path) -> Path:
    prepare_shards(settings(lines(tmp_path / "a.jsonl")), byte_level(), tmp_path / "out", 1)
    return tmp_path / "out"
