"""The command line: one dict of commands, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, get_type_hints

from oneblock.errors import OneblockError


@dataclass(frozen=True)
class Command:
    help: str
    target: str  # module:function; the function takes one dataclass, whose fields are the flags


COMMANDS = {
    "demo": Command("train a small Llama on this machine in about 90 seconds and let it write", "oneblock.demo:demo"),
    "models": Command("the lineage, with exact parameter counts", "oneblock.lineage.commands:models"),
    "compare": Command("parameters, KV cache, FLOPs and memory, side by side", "oneblock.lineage.commands:compare"),
    "diff": Command("what changed from one architecture to another, in words", "oneblock.lineage.commands:diff"),
    "data": Command("prepare text as token shards, check them, look at them", "oneblock.data.commands:data"),
    "train": Command("train a model on your own text", "oneblock.train.commands:train"),
    "runs": Command("list training runs, or plot several together", "oneblock.train.runs_command:runs"),
    "generate": Command("complete a prompt", "oneblock.infer.commands:generate"),
    "chat": Command("talk with a model in the terminal", "oneblock.infer.commands:chat"),
    "export": Command("write a model as one GGUF file, for llama.cpp and its kin", "oneblock.store.commands:export"),
    "quantize": Command("hold a model's weights in 8 or 4 bits", "oneblock.infer.quantize_command:quantize"),
    "tokenizer": Command("train a tokenizer, or see how one cuts a text", "oneblock.text.commands:tokenizer"),
}


def overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: oneblock COMMAND [FLAGS]\n\n"
        "One block for the whole text lineage: count it, load it, generate with it, train it.\n\n"
        f"{rows}\n\n"
        "oneblock COMMAND --help lists the flags of a command; --debug shows tracebacks; --version.\n"
    )


def load(name: str) -> tuple[Any, type]:
    """The function behind a command and the dataclass of its options."""
    module, _, function = COMMANDS[name].target.partition(":")
    run = getattr(importlib.import_module(module), function)
    return run, next(iter(get_type_hints(run).values()))


def end() -> NoReturn:
    """Run one command and end with its code; a rank that did not leave the others (ranks.joined) ends at once."""
    code = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done, 1: an error of one line, 2: wrong usage, 130: interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if args[0] == "--version":
        from oneblock import __version__

        print(f"oneblock {__version__}")
        return 0
    if args[0] not in COMMANDS:
        from oneblock.config import nearest

        print(f"error: unknown command {args[0]!r}{nearest(args[0], COMMANDS)} (oneblock --help)", file=sys.stderr)
        return 2
    return guarded(args[0], args[1:], debug)


def guarded(name: str, argv: list[str], debug: bool) -> int:
    """Run the command; what the user can mend ends in one line, and so does a defect unless `debug`."""
    try:
        execute(name, argv)
        sys.stdout.flush()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `oneblock models | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        if debug:
            traceback.print_exc()
            return 1
        known = isinstance(e, OneblockError)
        line = str(e) if known else f"unexpected {type(e).__name__}: {e} (--debug shows where)"
        print(f"error: {line}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


def execute(name: str, argv: list[str]) -> None:
    from oneblock.config import parse

    run, options = load(name)
    run(parse(options, argv, f"oneblock {name}"))
