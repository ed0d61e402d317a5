"""A dataclass as the flags of a command: parsing, aliases, range checks and `--help`.

A field is a flag (`lr` is `--lr`); a nested dataclass is a titled group of flags without a prefix; a field annotated
`Positional[..]` takes no flag. The comment behind a field, or right above it, is its help text.
"""

from __future__ import annotations

import inspect
import io
import re
import shutil
import sys
import textwrap
import tokenize
import types
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from oneblock import config
from oneblock.config import Range, check_ranges, hints, is_annotated, nearest, plain, range_of
from oneblock.errors import OneblockError

T = TypeVar("T")
FLAG = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)
KIBI = {"k": 1 << 10, "m": 1 << 20}  # `--context 8k` is 8,192 tokens, as model names have it (128k is 131,072)
SUFFIXED = re.compile(r"(\d+)([km])", re.IGNORECASE)
COLUMN, WIDTH = 32, 120  # where help texts begin, and the widest help


@dataclass(frozen=True)
class Flag:
    """One option of a command, as its dataclass declares it."""

    name: str  # "lr", "max-tokens"; of a positional the field's name
    hint: Any  # the type, without Annotated
    default: Any  # MISSING where it is required
    help: str
    group: str
    positional: bool = False
    limits: Range | None = None

    @property
    def is_bool(self) -> bool:
        return self.hint is bool

    @property
    def is_number(self) -> bool:
        """Whether values are numbers: int, float, also optional or as a tuple."""
        return bool({self.hint, *get_args(self.hint)} & {int, float})

    @property
    def spellings(self) -> list[str]:
        return [f"--{self.name}", *([f"--no-{self.name}"] if self.is_bool else [])]


def list_flags(cls: type, group: str = "") -> Iterator[Flag]:
    """Every flag and positional of the class, nested classes included, in the order of declaration."""
    texts = field_comments(cls)
    nested: list[tuple[type, str]] = []
    for field in fields(cls):
        hint = hints(cls)[field.name]
        if is_dataclass(plain(hint)):
            nested.append((plain(hint), field.name.replace("_", " ")))
            continue
        limits, text = range_of(hint), texts.get(field.name, "")
        text = f"{text}; {limits}" if limits is not None and str(limits) and text else text or str(limits or "")
        name = field.name.replace("_", "-")
        yield Flag(name, plain(hint), default_of(field), text, group, is_positional(hint), limits)
    for inner, title in nested:
        yield from list_flags(inner, title)


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def is_positional(hint: Any) -> bool:
    """Whether the hint carries tyro's marker, `tyro.conf.Positional`."""
    return is_annotated(hint) and any("POSITIONAL" in repr(note).upper() for note in get_args(hint)[1:])


def field_comments(cls: type) -> dict[str, str]:
    """The help text of each field: the comment on its own line, or the comment lines right above it."""
    texts: dict[str, str] = {}
    above: list[str] = []
    for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
        code, comment = split_comment(line)
        name = re.match(r"    (\w+)\s*:", code)
        if name:
            texts[name[1]] = " ".join([*above, comment]).strip()
        above = [*above, comment] if comment and not code.strip() else []
    return texts


def split_comment(line: str) -> tuple[str, str]:
    """A line of source as code and the text of its comment."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline):
            if token.type == tokenize.COMMENT:
                at = len(line) - len(line.lstrip()) + token.start[1]
                return line[:at], line[at:].lstrip("# ")
    except (tokenize.TokenError, IndentationError):
        pass
    return line, ""


# ------------------------------------------------------------------ parsing


def refuse(prog: str, message: str) -> SystemExit:
    """Print one line of wrong usage; the exit that follows has code 2."""
    print(f"error: {message} ({prog} --help lists the flags)", file=sys.stderr)
    return SystemExit(2)


def normalize(cls: type, argv: Sequence[str], prog: str) -> list[str]:
    """The arguments with canonical flag names and values: aliases, `--flag=false`, `8k`, `bf16`.

    An unknown flag ends the program.
    """
    known = {spelling: flag for flag in list_flags(cls) if not flag.positional for spelling in flag.spellings}
    normalized: list[str] = []
    current: Flag | None = None  # the flag that the next value belongs to
    for token in argv:
        if token == "--help" or not FLAG.fullmatch(token):
            normalized.append(token if current is None else normalize_value(current, token))
            continue
        name, equals, value = token.partition("=")
        name = name.replace("_", "-")
        if name not in known and (alias := "--" + config.FLAG_ALIASES.get(name[2:], "")) in known:
            name = alias
        if name not in known:
            raise refuse(prog, f"unknown flag {name}{nearest(name, [*known, '--help'])}")
        current = known[name]
        if equals and current.is_bool:
            name, equals = switch(name, value, prog), ""
        normalized.append(f"{name}={normalize_value(current, value)}" if equals else name)
    return normalized


def switch(name: str, value: str, prog: str) -> str:
    """`--json=false` as `--no-json`."""
    truth = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if value.lower() not in truth:
        raise refuse(prog, f"{name} is {value!r}, but it must be true or false")
    off = name.startswith("--no-")
    base = name.removeprefix("--no-") if off else name.removeprefix("--")
    return f"--{base}" if truth[value.lower()] != off else f"--no-{base}"


def normalize_value(flag: Flag, value: str) -> str:
    """`bf16` as `bfloat16` for a dtype, `8k` as `8192` for a number of tokens in `context`."""
    if flag.name.endswith("dtype"):
        return config.VALUE_ALIASES.get(value.lower(), value)
    size = SUFFIXED.fullmatch(value) if flag.name == "context" else None
    return str(int(size[1]) * KIBI[size[2].lower()]) if size else value


def config_path(cls: type, argv: Sequence[str]) -> Path | None:
    """The file of `--config FILE` or `--config=FILE`, where the class has such a field."""
    if "config" not in hints(cls):
        return None
    for token, after in zip_longest(argv, argv[1:], fillvalue=""):
        if token == "--config":
            return Path(after)
        if token.startswith("--config="):
            return Path(token.partition("=")[2])
    return None


def parse(cls: type[T], argv: Sequence[str], prog: str, examples: Sequence[str] = ()) -> T:
    """The options in `argv`. Wrong usage ends the program with one line and exit code 2."""
    if any(token in ("-h", "--help") for token in argv):
        print(help_text(cls, prog, examples), end="")
        raise SystemExit(0)
    import tyro

    argv = normalize(cls, argv, prog)
    errors = io.StringIO()
    try:
        path = config_path(cls, argv)
        call = partial(tyro.cli, cls, prog=prog, args=argv, config=(tyro.conf.OmitArgPrefixes,))
        with redirect_stderr(errors):
            options = call() if path is None else call(default=config.load_toml(cls, path))
        check_ranges(options)
        return options
    except OneblockError as error:
        raise refuse(prog, str(error)) from None
    except SystemExit:
        raise refuse(prog, one_line(errors.getvalue())) from None


def typed_fields(cls: type, argv: Sequence[str]) -> set[str]:
    """Names of the fields that valid arguments set, by a flag or in the file of `--config`, default values included."""
    argv = normalize(cls, argv, "")
    typed = {token.partition("=")[0] for token in argv if FLAG.fullmatch(token)}
    names = {flag.name.replace("-", "_") for flag in list_flags(cls) if typed & {*flag.spellings}}
    tables = [] if (path := config_path(cls, argv)) is None else [config.read_toml(path)]
    for table in tables:
        names |= {key for key, value in table.items() if not isinstance(value, dict)}
        tables += [value for value in table.values() if isinstance(value, dict)]
    return names


def one_line(box: str) -> str:
    """The message of a boxed error of the parser, without the box, up to its first rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    rule = next((i for i, line in enumerate(lines) if line.startswith("───") or line.startswith("╰")), len(lines))
    message = " ".join(" ".join(lines[:rule]).split())
    return message.replace("{None}|", "").replace("None|", "")


# ------------------------------------------------------------------ help


def help_text(cls: type, prog: str, examples: Sequence[str] = ()) -> str:
    """Usage, description, examples, and every flag with its type, meaning, range and default."""
    width = min(shutil.get_terminal_size().columns, WIDTH)
    flags = list(list_flags(cls))
    positionals = [flag for flag in flags if flag.positional]
    usage = " ".join([f"usage: {prog}", *(placeholder(flag) for flag in positionals), "[FLAGS]"])
    sections = [usage, textwrap.fill(inspect.getdoc(cls) or "", width)]
    if examples:
        sections.append("\n".join(["examples:", *(f"  {example}" for example in examples)]))
    if positionals:
        sections.append("\n".join(["arguments:", *(row(placeholder(f), f, width) for f in positionals)]))
    for group in dict.fromkeys(flag.group for flag in flags):
        rows = [row(label(f), f, width) for f in flags if f.group == group and not f.positional]
        if rows:
            sections.append("\n".join([f"{group or 'flags'}:", *rows]))
    return "\n\n".join(sections) + "\n"


def label(flag: Flag) -> str:
    """`--lr FLOAT`; `--[no-]stream` for a switch that is on by default."""
    if flag.is_bool and flag.default is True:
        return f"--[no-]{flag.name}"
    return f"--{flag.name} {metavar(flag.hint)}"


def row(left: str, flag: Flag, width: int) -> str:
    """`  --lr FLOAT     learning rate at its peak; above 0 (default 0.001)`, wrapped."""
    text = f"{flag.help} ({note})" if (note := default_note(flag)) else flag.help
    body = textwrap.wrap(text, max(width - COLUMN, 30)) or [""]
    first = f"  {left.rstrip()}"
    lines = [f"{first:<{COLUMN}}{body[0]}", *(" " * COLUMN + line for line in body[1:])]
    if len(first) >= COLUMN - 1:
        lines = [first, *(" " * COLUMN + line for line in body)]
    return "\n".join(lines)


def default_note(flag: Flag) -> str:
    """`default 0.001`, `required`; nothing for an absent or empty default, which the text explains."""
    if flag.default is MISSING:
        return "required"
    if flag.is_bool:
        return "default on" if flag.default else ""
    if flag.default in (None, "", ()):
        return ""
    value = flag.default
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}" if is_large(value) else str(value)
    return f"default {shown!r}" if isinstance(value, str) and not value.isprintable() else f"default {shown}"


def is_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= 10_000


def placeholder(flag: Flag) -> str:
    """`MODEL`, `NAMES...`, `[FOLDER]`."""
    name = flag.name.upper() + ("..." if get_origin(flag.hint) is tuple else "")
    return name if flag.default is MISSING else f"[{name}]"


NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: ""}


def metavar(hint: Any) -> str:
    """`FLOAT`, `auto|on|off`, `PATH...`: the kind of value that a flag takes."""
    origin, args = get_origin(hint), [a for a in get_args(hint) if a is not type(None)]
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(metavar(plain(a)) for a in args))
    if origin is tuple:
        return metavar(plain(args[0])) + "..."
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)).upper())
