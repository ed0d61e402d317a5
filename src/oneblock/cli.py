"""The command line: one dict of commands, each imported when it is first run."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any, NoReturn, get_type_hints

from oneblock.errors import OneblockError


@dataclass(frozen=True)
class Command:
    help: str
    target: str  # module:function; the function takes one dataclass, whose fields are the flags
    examples: tuple[str, ...]  # shown by `oneblock COMMAND --help`


COMMANDS = {
    "demo": Command(
        "train a small Llama on this machine in about 90 seconds and sample from it",
        "oneblock.demo:demo",
        ("oneblock demo", "oneblock demo --seconds 30 --out runs/demo"),
    ),
    "models": Command(
        "list published models with their exact parameter counts and sizes",
        "oneblock.lineage.commands:models",
        ("oneblock models", "oneblock models --family llama --json"),
    ),
    "compare": Command(
        "compare parameters, KV cache, FLOPs, memory and training cost of models side by side",
        "oneblock.lineage.commands:compare",
        ("oneblock compare gpt2 llama-3-8b", "oneblock compare llama-3-8b qwen3-8b --context 32k --plot costs.png"),
    ),
    "diff": Command(
        "describe how two architectures differ",
        "oneblock.lineage.commands:diff",
        ("oneblock diff llama-2-7b llama-3-8b", "oneblock diff gpt2 path/to/config.json --json"),
    ),
    "data": Command(
        "tokenize text into shards for training, verify shards, or print their statistics",
        "oneblock.data.commands:data",
        (
            "oneblock data prepare --data corpus.jsonl --tokenizer path/to/tokenizer --out tokens",
            "oneblock data verify tokens",
        ),
    ),
    "train": Command(
        "train a model from random weights, or continue pretraining from a checkpoint",
        "oneblock.train.commands:train",
        (
            "oneblock train --data book.txt --tokenizer bpe --model llama --dim 256 --n-layers 6 --steps 2000",
            "oneblock train --resume runs/1",
        ),
    ),
    "runs": Command(
        "list training runs, or compare the loss curves of several",
        "oneblock.train.runs_command:runs",
        ("oneblock runs list", "oneblock runs compare runs/1 runs/2"),
    ),
    "generate": Command(
        "complete a prompt, or a file of prompts",
        "oneblock.infer.commands:generate",
        (
            'oneblock generate path/to/model --prompt "Once upon a time" --temperature 0.8',
            "oneblock generate path/to/model --input prompts.jsonl --output replies.jsonl",
        ),
    ),
    "chat": Command(
        "chat with a model in the terminal",
        "oneblock.infer.commands:chat",
        ("oneblock chat path/to/model", 'oneblock chat path/to/model --system "Answer briefly."'),
    ),
    "export": Command(
        "write a model as one GGUF file, for llama.cpp and other GGUF readers",
        "oneblock.store.commands:export",
        ("oneblock export path/to/model model.gguf", "oneblock export path/to/model model-q8.gguf --type q8_0"),
    ),
    "quantize": Command(
        "write a copy of a model with int8, int4 or fp8 weights",
        "oneblock.infer.quantize_command:quantize",
        (
            "oneblock quantize path/to/model model-int8 --bits 8",
            "oneblock quantize path/to/model model-int4 --bits 4 --calibrate text.txt --report",
        ),
    ),
    "tokenizer": Command(
        "train a BPE tokenizer, or show how a tokenizer splits a text",
        "oneblock.text.commands:tokenizer",
        (
            "oneblock tokenizer --train book.txt --vocab 4096 --out tokenizer",
            'oneblock tokenizer --model path/to/tokenizer --text "Hello world"',
        ),
    ),
}


def overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: oneblock COMMAND [FLAGS]\n\n"
        "Decoder-only language models from GPT-1 to Llama 4: inspect, cost, train, quantize, generate, chat.\n\n"
        f"{rows}\n\n"
        "oneblock COMMAND --help lists a command's flags with examples; --debug shows tracebacks; --version.\n"
    )


def load(name: str) -> tuple[Any, type]:
    """The function behind a command and the dataclass of its options."""
    module, _, function = COMMANDS[name].target.partition(":")
    run = getattr(importlib.import_module(module), function)
    return run, next(iter(get_type_hints(run).values()))


def end() -> NoReturn:
    """Run one command and exit with its code; a rank whose process group is open exits at once."""
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
    """Run the command and return its exit code; every error is one line unless `debug` asks for the traceback."""
    try:
        execute(name, argv)
        sys.stdout.flush()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `oneblock models | head` closes the pipe
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
    """Parse the flags and run the command; one that takes `typed` is told which fields were given."""
    from oneblock.flags import parse, typed_fields

    run, cls = load(name)
    options = parse(cls, argv, f"oneblock {name}", COMMANDS[name].examples)
    if "typed" in signature(run).parameters:
        run(options, typed=typed_fields(cls, argv))
    else:
        run(options)
