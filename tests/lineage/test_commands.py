"""oneblock models, compare and diff, through the command line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from oneblock.cli import main
from oneblock.lineage import spec_of, table
from oneblock.lineage.commands import Compare, compute_costs
from oneblock.spec import MODELS, get_spec

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return tmp_path / "mine"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(argv)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def rows(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    return json.loads(run(capsys, *argv, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_models_as_json(capsys: pytest.CaptureFixture[str]):
    found = {row["name"]: row for row in rows(capsys, "models")}
    assert list(found) == list(MODELS)
    assert found["llama-4-scout"]["params_total"] == 107_769_861_120
    assert found["llama-4-scout"]["params_active"] == 17_172_894_720
    assert found["gpt2"]["title"] == "GPT-2 small (124M)"
    assert found["gemma-3-1b"]["window"] == 512


def test_models_as_a_table(capsys: pytest.CaptureFixture[str]):
    lines = run(capsys, "models").splitlines()
    assert any("llama-3-8b" in x and "8,030,261,248" in x and "32/8 x 128" in x and "131 kB" in x for x in lines)
    assert all(any(name in line.split() for line in lines) for name in MODELS)
    assert "llama-3-8b" not in run(capsys, "models", "--family", "gpt2")


def test_a_narrow_screen_shows_fewer_columns(capsys: pytest.CaptureFixture[str]):
    shown = [table.model_row(m, get_spec(m.name)) for m in MODELS.values()]
    assert len(table.models_table(shown, 200).columns) == len(table.COLUMNS)
    narrow = Console(width=60)
    narrow.print(table.models_table(shown, 60))
    assert "107,769,861,120" in capsys.readouterr().out


def test_compare_gpt2_with_llama_3(capsys: pytest.CaptureFixture[str]):
    gpt2, llama = rows(capsys, "compare", "gpt2", "llama-3-8b", "--context", "8192")
    assert (gpt2["params_total"], llama["params_total"]) == (124_439_808, 8_030_261_248)
    assert (gpt2["kv_bytes"], llama["kv_bytes"]) == (301_989_888, 1_073_741_824)
    assert llama["ratios"]["params_total"] == pytest.approx(64.53, abs=0.01)
    assert llama["ratios"]["kv_bytes"] == pytest.approx(32 / 9)
    assert gpt2["ratios"]["flops_decode"] == 1
    assert sum(llama["parts"].values()) == llama["params_total"]
    assert llama["serving"]["total"] == sum(llama["serving"][k] for k in ("weights", "cache", "workspace"))


def test_compare_as_a_table(capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "compare", "gpt2", "mixtral-8x7b", "--batch-size", "4", "--gpus", "16", "--gpu", "a100")
    for words in ("375x", "12.9 B", "4 x 8,192 tokens", "16 x A100 at 40% MFU", "gpt2 has a context of 1,024 tokens"):
        assert words in out


def test_options_reach_the_figures(capsys: pytest.CaptureFixture[str]):
    (base,) = rows(capsys, "compare", "gpt2", "--context", "1024")
    (other,) = rows(capsys, "compare", "gpt2", "--context", "1024", "--dtype", "float32", "--price", "5", "--gpus", "1")
    assert other["serving"]["weights"] == 2 * base["serving"]["weights"]
    assert other["run"]["dollars"] == pytest.approx(2 * base["run"]["dollars"])
    assert other["run"]["seconds"] == pytest.approx(8 * base["run"]["seconds"])
    (image,) = rows(capsys, "compare", "llama-3.2-11b-vision", "--image-tokens", "6404", "--tokens", "1e9")
    assert image["run"]["tokens"] == 1e9
    assert image["kv_bytes"] == 8192 * 131072 + 8 * 4096 * 6404


def test_a_narrow_screen_shows_several_tables():
    options = Compare(("gpt2", "llama-3-8b", "gemma-3-27b", "gpt-oss-20b"))
    costs = [compute_costs(name, options) for name in options.names]
    assert len(table.comparison_tables(costs, "8 x H100", 0.4, 200)) == 1
    narrow = table.comparison_tables(costs, "8 x H100", 0.4, 80)
    assert len(narrow) == 3
    for each, name in zip(narrow, options.names[1:], strict=True):
        out = io.StringIO()
        Console(width=80, file=out).print(each)
        assert "gpt2" in out.getvalue() and name in out.getvalue() and "…" not in out.getvalue()


def test_compare_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    target = tmp_path / "picture.png"
    out = run(capsys, "compare", "gpt2", "gemma-3-1b", "llama-3-8b", "--plot", str(target))
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 20_000
    assert "picture.png" in out.replace("\n", "")


def test_a_configuration_stands_in_for_a_name(capsys: pytest.CaptureFixture[str], folder: Path):
    assert spec_of(str(folder)) == spec_of(str(folder / "config.json")) == get_spec("llama-3-8b")
    named, mine = rows(capsys, "compare", "llama-3-8b", str(folder / "config.json"))
    assert mine["name"] == "mine"
    assert {**mine, "name": ""} == {**named, "name": ""}
    assert "have the same architecture" in run(capsys, "diff", "llama-3-8b", str(folder))


def test_diff(capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "diff", "llama-2-7b", "llama-3-8b")
    assert "32 query heads of 128, 8 KV heads (GQA)" in out
    changes = rows(capsys, "diff", "gpt1", "gpt2")
    assert changes[-1] == {"what": "final norm", "before": "none", "after": "yes"}


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "did you mean 'llama-3-8b'" in refused(capsys, "compare", "llama-3-8")
    assert "give at least one model" in refused(capsys, "compare")
    assert "no such file or folder" in refused(capsys, "diff", "gpt2", str(tmp_path / "config.json"))
    assert "choose from gpt1" in refused(capsys, "models", "--family", "gpt9")
    assert "unknown dtype" in refused(capsys, "compare", "gpt2", "--dtype", "int9")
    (tmp_path / "file").write_text("")
    assert "could not be written" in refused(capsys, "compare", "gpt2", "--plot", str(tmp_path / "file" / "x.png"))
    assert "at least 1 and at most" in refused(capsys, "compare", "gpt2", "--context", "0")
    assert "--family" in refused(capsys, "models", "--famly", "llama")


def test_a_family_says_that_its_sizes_are_not_published(capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "compare", "gpt3", "llama")
    assert "gpt3 is a family at its small default size" in out and "gpt3-small" in out
    assert "llama is a family at its small default size" in out
    assert "family" not in run(capsys, "compare", "gpt3-small")


def test_a_piped_table_is_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capsys, "models")
    assert "…" not in out and "402,000" not in out
    assert all(column in out for column in table.COLUMNS)


@pytest.mark.parametrize("width", [30, 60, 80, 100, 120])
def test_a_narrow_terminal_leaves_out_whole_columns_and_says_so(width: int):
    listed = [table.model_row(m, get_spec(m.name)) for m in MODELS.values()]
    out = io.StringIO()
    Console(width=width, file=out).print(table.models_table(listed, width))
    assert "…" not in out.getvalue()
    assert "Too narrow for" in " ".join(out.getvalue().split())
