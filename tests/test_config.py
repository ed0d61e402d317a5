from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneblock.config import load_toml, to_toml
from oneblock.errors import OneblockError
from oneblock.flags import list_flags, parse


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    fused: bool = True


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    data: tuple[Path, ...] = ()
    kind: Literal["a", "b"] = "a"
    steps: int | None = None
    note: str = ""
    config: Path | None = None
    inner: Inner = field(default_factory=Inner)


def test_flags_become_fields() -> None:
    o = parse(Options, ["--data", "x", "y", "--lr", "0.5", "--no-fused", "--steps=3"], "prog")
    assert o == Options(data=(Path("x"), Path("y")), steps=3, inner=Inner(lr=0.5, fused=False))
    spellings = {spelling for flag in list_flags(Options) for spelling in flag.spellings}
    assert {"--data", "--lr", "--fused", "--no-fused"} <= spellings


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--step", "3"], "unknown flag --step: did you mean --steps?"),
        (["--no-fusd"], "did you mean --no-fused?"),
        (["--steps", "x"], "--steps"),
        (["--kind", "c"], "'a', 'b'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, argv, "prog")
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_no_flags_at_all() -> None:
    assert parse(Options, [], "prog") == Options()


def test_file_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 7\ndata = ["a.txt"]\n[inner]\nlr = 1\n')
    o = parse(Options, ["--config", str(path), "--no-fused"], "prog")
    assert (o.steps, o.data, o.inner) == (7, (Path("a.txt"),), Inner(lr=1.0, fused=False))
    assert parse(Options, [f"--config={path}", "--steps", "9"], "prog").steps == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stps = 3", "unknown key 'stps': did you mean steps?"),
        ("[inner]\nlearn = 3", "inner: unknown key 'learn'"),
        ("steps = 'x'", "steps is 'x', but it must be int"),
        ("steps = true", "steps is True, but it must be int"),
        ("kind = 'c'", "must be 'a' or 'b'"),
        ("steps =", "not valid TOML"),
    ],
)
def test_bad_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(OneblockError, match=said.replace("?", r"\?")) as error:
        load_toml(Options, path)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OneblockError, match="cannot read the configuration"):
        load_toml(Options, tmp_path / "none.toml")


text = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.builds(
        Options,
        data=st.lists(text.map(lambda s: Path("d") / s.replace("\0", "")), max_size=3).map(tuple),
        kind=st.sampled_from("ab"),
        steps=st.none() | st.integers(-(2**63), 2**63 - 1),
        note=text,
        inner=st.builds(Inner, lr=st.floats(allow_nan=False), fused=st.booleans()),
    )
)
def test_toml_round_trip(options: Options) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "o.toml"
        path.write_text(to_toml(options), encoding="utf-8", newline="")
        assert load_toml(Options, path) == options
