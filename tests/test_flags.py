"""Flags: aliases, values, ranges, and the help of every command."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from tyro.conf import Positional

from oneblock.cli import COMMANDS, load
from oneblock.config import FLAG_ALIASES, SEED, Range
from oneblock.flags import help_text, list_flags, parse


@dataclass(frozen=True)
class Optimizer:
    """The optimizer."""

    lr: Annotated[float, Range(above=0)] = 1e-3  # peak learning rate
    betas: Annotated[tuple[float, ...], Range(0, below=1)] = (0.9, 0.99)  # decay of the moments


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    model: Positional[str]  # a model's folder
    dtype: str | None = None  # dtype of the weights
    context: int | None = None  # tokens of context
    max_tokens: int = 256  # tokens of a reply
    json: bool = False  # print JSON
    stream: bool = True  # print tokens as they come
    # the seed of all
    # random numbers
    seed: Annotated[int | None, SEED] = None
    mode: Literal["auto", "on"] = "auto"  # how to compile
    optimizer: Optimizer = field(default_factory=Optimizer)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max-new-tokens", "3"], "max_tokens", 3),
        (["--max-new-tokens=3"], "max_tokens", 3),
        (["--max_tokens", "3"], "max_tokens", 3),
        (["--max-model-len", "8k"], "context", 8192),
        (["--context=128K"], "context", 131072),
        (["--torch-dtype", "bf16"], "dtype", "bfloat16"),
        (["--dtype=fp16"], "dtype", "float16"),
        (["--json=false"], "json", False),
        (["--json=true"], "json", True),
        (["--no-stream"], "stream", False),
        (["--stream=false"], "stream", False),
    ],
)
def test_common_spellings_are_accepted(argv: list[str], name: str, value: object) -> None:
    assert getattr(parse(Options, ["folder", *argv], "prog"), name) == value


def test_an_alias_reaches_a_nested_option() -> None:
    assert parse(Options, ["folder", "--learning-rate", "0.5"], "prog").optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "nan"], "lr is nan, but it must be above 0"),
        (["--lr", "-1"], "lr is -1.0, but it must be above 0"),
        (["--lr", "inf"], "lr is inf"),
        (["--betas", "0.9", "1"], "betas is 1.0, but it must be at least 0 and below 1"),
        (["--seed", str(2**63)], "seed is 9223372036854775808"),
        (["--json=perhaps"], "it must be true or false"),
        (["--max-tokens", "8k"], "--max-tokens"),
        (["--grad-clip", "1"], "unknown flag --grad-clip"),  # no such option here
    ],
)
def test_bad_values_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["folder", *argv], "prog")
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert err.count("\n") == 1


def test_every_alias_names_a_flag_of_some_command() -> None:
    known = {flag.name for name in COMMANDS for flag in list_flags(load(name)[1])}
    assert not [alias for alias, target in FLAG_ALIASES.items() if target not in known]
    assert not FLAG_ALIASES.keys() & known, "an alias is a flag itself"


def test_help_shows_types_ranges_defaults_and_examples() -> None:
    text = help_text(Options, "prog", ("prog folder", "prog folder --json"))
    assert text.startswith("usage: prog MODEL [FLAGS]\n")
    assert "  prog folder --json\n" in text
    words = " ".join(text.split())
    assert "--lr FLOAT peak learning rate; above 0 (default 0.001)" in words
    assert "--seed INT the seed of all random numbers; at least 0" in words
    assert "--mode auto|on how to compile (default auto)" in words
    assert "--[no-]stream print tokens as they come (default on)" in words
    assert "--json print JSON" in words


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str) -> None:
    _, options = load(name)
    assert len(COMMANDS[name].examples) == 2
    assert not [flag.name for flag in list_flags(options) if not flag.help], "flags without a description"
    text = help_text(options, f"oneblock {name}", COMMANDS[name].examples)
    assert not re.search(r"\{None\}|\bNone\b|\(default: \)|\bSTR\b", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range(name: str) -> None:
    bare = [flag.name for flag in list_flags(load(name)[1]) if flag.is_number and flag.limits is None]
    assert not bare, "numeric options without a Range"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_every_command_parse(name: str) -> None:
    import shlex

    for example in COMMANDS[name].examples:
        program, command, *argv = shlex.split(example)
        assert (program, command) == ("oneblock", name)
        parse(load(name)[1], argv, f"oneblock {name}")
