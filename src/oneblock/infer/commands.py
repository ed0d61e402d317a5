"""`oneblock generate` and `oneblock chat`."""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional

from oneblock.errors import OneblockError
from oneblock.files import write_file

if TYPE_CHECKING:
    from oneblock.infer.chat import Conversation
    from oneblock.infer.llm import LLM, Completion
    from oneblock.parallel.process_group import ProcessGroup

HELP = """\
/reset      forget everything said so far
/save FILE  write the conversation to a file
/help       this
/quit       leave (or Ctrl-D); Ctrl-C stops a reply, twice leaves"""


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen. What is left out is as the model's generation_config.json has it, else without effect."""

    temperature: float | None = None  # 0: always the likeliest token; 1: the model's own distribution
    top_k: int | None = None  # choose among this many of the likeliest; 0: all
    top_p: float | None = None  # among the fewest that have this much of the probability
    min_p: float | None = None  # among those at least this likely, relative to the likeliest
    repetition_penalty: float | None = None  # above 1: fewer tokens that prompt or reply already have
    presence_penalty: float | None = None  # subtracted from the logits of tokens the reply has
    frequency_penalty: float | None = None  # the same, times how often
    seed: int | None = None  # the same seed gives the same reply


@dataclass(frozen=True)
class Constraining:
    """What the whole reply must be; one of these at most."""

    schema: str | None = None  # JSON that keeps to this JSON schema: a file of it, or the schema itself
    regex: str | None = None  # matched by this, in the syntax of Rust's regex crate
    grammar: Path | None = None  # a file with a Lark grammar
    choices: tuple[str, ...] = ()  # one of these texts

    def asked(self) -> dict[str, Any]:
        """The options of `LLM.generate`."""
        schema, grammar = self.schema, self.grammar
        if schema is not None and schema.lstrip()[:1] not in ("{", "[", '"', ""):
            schema = "true" if schema.strip() == "true" else read(Path(schema))
        found = {"schema": schema, "regex": self.regex, "grammar": grammar and read(grammar), "choices": self.choices}
        return {name: value for name, value in found.items() if value not in (None, ())}


@dataclass(frozen=True)
class Loading:
    """Which model, and how it is held."""

    model: Positional[str]  # a model's folder, or its org/name on the hub
    dtype: str | None = None  # float32, bfloat16 or float16; left out: as it is stored
    device: str = "cpu"  # cpu, cuda, cuda:1, ..
    compile: Literal["auto", "on", "off"] = "auto"  # a token's step as one graph; auto: in long texts
    context: int | None = None  # tokens to make room for, past what the model was made for
    rope_scaling: Literal["yarn", "linear", "dynamic"] = "yarn"  # how --context extends RoPE
    kv_cache_dtype: Literal["auto", "int8"] = "auto"  # dtype of keys and values; auto: the dtype of the model
    prompt_cache: Path | None = None  # a file that keeps what was read of a single prompt for later runs
    num_speculative_tokens: int = 0  # speculative decoding: draft tokens per step (4 to 8 are usual); 0: off
    draft_model: str | None = None  # a smaller model with the same tokenizer; default: n-grams of the sequence itself


@dataclass(frozen=True)
class Many:
    """A file of prompts. Started again after a kill, it goes on with those that the output does not have."""

    input: Path | None = None  # {"prompt": ..} or {"messages": [..]} on each line, perhaps with "id" and options
    output: Path | None = None  # a line for each, in the order in which they end
    batch_size: int | None = None  # prompts at once; left out: what half of the free memory holds


@dataclass(frozen=True)
class GenerateOptions:
    """Complete a prompt, or a file of them."""

    loading: Loading
    prompt: str | None = None  # the text to go on with; left out: read from standard input
    ids: tuple[int, ...] = ()  # the prompt as token ids, for a model without a tokenizer
    max_tokens: int = 256
    stop: tuple[str, ...] = ()  # texts that end the reply
    ignore_eos: bool = False  # go on when the model would end
    choosing: Choosing = field(default_factory=Choosing)
    constraining: Constraining = field(default_factory=Constraining)
    many: Many = field(default_factory=Many)
    stream: bool = True  # show the text while it grows
    json: bool = False  # print text, ids, log-probabilities and times as JSON


@dataclass(frozen=True)
class ChatOptions:
    """Talk with a model in the terminal."""

    loading: Loading
    system: str | None = None  # what the model is told before the conversation
    max_tokens: int = 1024  # of one reply
    choosing: Choosing = field(default_factory=Choosing)


def read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise OneblockError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OneblockError(f"{path} is no UTF-8 text") from None


def opened(loading: Loading, ranks: ProcessGroup | None = None) -> LLM:
    from oneblock.infer.llm import load
    from oneblock.kernels.heap import MOST, reuse_memory

    if not loading.device.startswith("cuda"):
        reuse_memory(MOST)
    llm = load(loading.model, loading.dtype, loading.device, ranks)
    llm.compile = loading.compile
    llm.kv_cache_dtype = loading.kv_cache_dtype
    llm.prompt_cache = loading.prompt_cache
    if loading.context is not None:
        llm.extend_context(loading.context, loading.rope_scaling)
    if loading.draft_model is not None and not loading.num_speculative_tokens:
        raise OneblockError(
            "--draft-model has no effect without --num-speculative-tokens: add --num-speculative-tokens 5"
        )
    if loading.num_speculative_tokens:
        draft = load(loading.draft_model, loading.dtype, loading.device) if loading.draft_model else None
        llm.set_speculative_decoding(loading.num_speculative_tokens, draft)
    return llm


# ------------------------------------------------------------------ generate


def generate(options: GenerateOptions) -> None:
    """On the ranks that torchrun has started, or here; the first of them writes."""
    from oneblock.parallel.process_group import init_process_group

    with (
        init_process_group(options.loading.device) as ranks,
        redirect_stdout(sys.stdout if ranks.rank == 0 else io.StringIO()),
    ):
        written(options, ranks)


def written(options: GenerateOptions, ranks: ProcessGroup) -> None:
    many = options.many
    if ranks.size > 1 and ((options.prompt is None and not options.ids) or many != Many()):
        raise OneblockError("several ranks go on with one prompt: give --prompt or --ids")
    if ranks.size > 1 and options.loading.prompt_cache is not None:
        raise OneblockError("--prompt-cache holds the keys of one process: leave it out on several ranks")
    prompt = asked(options) if many == Many() else None
    if prompt is None and (many.input is None or many.output is None or options.prompt is not None or options.ids):
        raise OneblockError("a file of prompts needs --input and --output, and no other prompt")
    llm = opened(options.loading, ranks)
    choosing = asdict(options.choosing)
    if ranks.size > 1 and options.choosing.seed is None:
        choosing["seed"] = 0  # ranks must draw alike
    chosen: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "stop": options.stop,
        "ignore_eos": options.ignore_eos,
        **choosing,
        **options.constraining.asked(),
    }
    if many.input is not None and many.output is not None:
        from oneblock.infer.batch import complete_file

        complete_file(llm, many.input, many.output, many.batch_size, chosen)
    elif prompt is not None:
        complete(llm, prompt, chosen, options)


def complete(llm: LLM, prompt: str | list[int], chosen: dict[str, Any], options: GenerateOptions) -> None:
    if options.json:
        start = time.perf_counter()
        print_json(llm.generate(prompt, **chosen), prompt, time.perf_counter() - start)
        return
    if options.stream:
        pieces = llm.stream(prompt, **chosen) if llm.tokenizer else (f"{i} " for i in llm.stream_ids(prompt, **chosen))
    else:
        pieces = iter([str(llm.generate(prompt, **chosen))])
    screen = Console(highlight=False)
    if screen.is_terminal and isinstance(prompt, str):
        screen.print(escape(prompt), end="", style="dim", soft_wrap=True)
    show(pieces)
    print()
    if llm.speculative_stats.guessed:
        Console(stderr=True, highlight=False).print(f"[dim]{llm.speculative_stats}[/]")


def asked(options: GenerateOptions) -> str | list[int]:
    """The prompt: a flag, ids, or all of standard input."""
    if options.prompt is not None and options.ids:
        raise OneblockError("give the prompt once: as --prompt or as --ids")
    if options.ids:
        return list(options.ids)
    if options.prompt is not None:
        return options.prompt
    if sys.stdin.isatty():
        raise OneblockError('no prompt: give --prompt "Once upon a time", or a text on standard input')
    return sys.stdin.read()


def show(pieces: Iterator[str]) -> str:
    """Write pieces as they come, and return them all."""
    shown = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        shown += piece
    return shown


def print_json(found: Completion, prompt: str | list[int], seconds: float) -> None:
    row = asdict(found)
    tokens = {"prompt_tokens": len(row.pop("prompt_ids")), "seconds": round(seconds, 3)}
    del row["top_logprobs"]
    print(json.dumps({"prompt": prompt, **row, **tokens}, ensure_ascii=False))


# ------------------------------------------------------------------ chat


def chat(options: ChatOptions) -> None:
    from oneblock.infer.chat import Conversation

    screen = Console(highlight=False)
    llm = opened(options.loading)
    if llm.tokenizer is None:
        raise OneblockError(f"{options.loading.model} has no tokenizer to talk with: use oneblock generate --ids")
    request = llm.request(max_tokens=options.max_tokens, **asdict(options.choosing))
    conversation = Conversation(llm, request, options.system)
    if screen.is_terminal:
        screen.print(f"[bold]{escape(options.loading.model)}[/]  [dim]/help lists the commands[/]")
    if not conversation.templated:
        note = "This model has no chat template: it was made to go on with a text, and does so with what you write."
        Console(stderr=True, highlight=False).print(f"[dim]{note}[/]", soft_wrap=True)
    talk(conversation, screen)


def talk(conversation: Conversation, screen: Console) -> None:
    """Lines in, replies out, until the end of input, /quit, or two interrupts in a row."""
    with suppress(ImportError):  # a history and arrow keys, where Python has them
        importlib.import_module("readline")
    interrupted = False
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and screen.is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            screen.print("\n[dim]Ctrl-C again, or Ctrl-D, leaves[/]")
            continue
        interrupted = False
        if line.startswith("/"):
            if not command(line, conversation, screen):
                return
        elif line:
            interrupted = not answer(line, conversation, screen)


def command(line: str, conversation: Conversation, screen: Console) -> bool:
    """Carry out a /command; False: leave."""
    name, _, argument = line.partition(" ")
    match name:
        case "/quit" | "/exit":
            return False
        case "/reset":
            conversation.reset()
            screen.print("[dim]forgotten[/]")
        case "/save":
            save(conversation, argument.strip(), screen)
        case "/help":
            screen.print(HELP, markup=False)
        case _:
            screen.print(f"unknown command {name}; /help lists them", markup=False)
    return True


def save(conversation: Conversation, path: str, screen: Console) -> None:
    """The turns as JSON, in the form that chat templates and training files take."""
    if not path:
        screen.print("say where to: /save FILE", markup=False)
        return
    try:
        write_file(path, json.dumps(conversation.messages, indent=1, ensure_ascii=False) + "\n")
    except OneblockError as error:
        screen.print(str(error), markup=False)
        return
    screen.print(f"{len(conversation.messages)} messages written to {path}", markup=False)


def answer(line: str, conversation: Conversation, screen: Console) -> bool:
    """Show the reply as it comes; False where it was interrupted."""
    reply = conversation.say(line)
    try:
        show(reply)
        print()
    except KeyboardInterrupt:
        reply.close()  # pyright: ignore[reportAttributeAccessIssue]
        screen.print("\n[dim](stopped)[/]")
        return False
    except OneblockError as error:
        screen.print(f"error: {error} (or /reset)", markup=False, soft_wrap=True)
    return True
