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
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional

from oneblock.config import SEED, Range
from oneblock.errors import OneblockError
from oneblock.files import read_text, write_file
from oneblock.infer import options as limits

if TYPE_CHECKING:
    from oneblock.infer.chat import Conversation
    from oneblock.infer.llm import LLM, Completion
    from oneblock.parallel.process_group import ProcessGroup

HELP = """\
/reset      start a new conversation
/save FILE  write the messages as JSON
/help       show this list
/quit       leave (also Ctrl-D); Ctrl-C stops a reply, twice leaves"""


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling parameters. The default is that of the model's generation_config.json, else no effect."""

    temperature: Annotated[float | None, limits.TEMPERATURE] = None  # divides the logits; 0: greedy
    top_k: Annotated[int | None, limits.TOP_K] = None  # sample from this many of the most likely tokens; 0: all
    top_p: Annotated[float | None, limits.TOP_P] = None  # nucleus sampling: the smallest set with this probability mass
    min_p: Annotated[float | None, limits.MIN_P] = None  # least probability of a token, relative to the most likely one
    repetition_penalty: Annotated[float | None, limits.REPETITION_PENALTY] = None  # above 1: fewer repetitions
    presence_penalty: Annotated[float | None, limits.PENALTY] = None  # subtracted from logits of tokens in the reply
    frequency_penalty: Annotated[float | None, limits.PENALTY] = None  # the same, times the token's count in the reply
    seed: Annotated[int | None, SEED] = None  # seed of sampling; default: random


@dataclass(frozen=True)
class StructuredOutputFlags:
    """A constraint on the whole reply; one at most."""

    schema: str | None = None  # reply with JSON of this JSON schema: a file, or the schema itself
    regex: str | None = None  # reply with a match of this regular expression, in the syntax of Rust's regex crate
    grammar: Path | None = None  # reply with a sentence of this Lark grammar, a file
    choices: tuple[str, ...] = ()  # reply with one of these strings

    def to_options(self) -> dict[str, Any]:
        """The options of `LLM.generate`, with files read."""
        schema = self.schema
        if schema is not None and schema.lstrip()[:1] not in ("{", "[", '"', ""):
            schema = "true" if schema.strip() == "true" else read_text(Path(schema))
        grammar = None if self.grammar is None else read_text(self.grammar)
        options = {"schema": schema, "regex": self.regex, "grammar": grammar, "choices": self.choices}
        return {name: value for name, value in options.items() if value not in (None, ())}


@dataclass(frozen=True)
class LoadingFlags:
    """The model, its dtype and device, and its KV cache."""

    model: Positional[str]  # a model's folder, a .gguf file, or org/name on the hub
    dtype: str | None = None  # float32, bfloat16 or float16; default: as stored
    device: str = "cpu"  # cpu, cuda, cuda:1, ..
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the decode step; auto: where enough tokens follow
    context: Annotated[int | None, limits.CONTEXT] = None  # extend the context to this many tokens by RoPE scaling
    rope_scaling: Literal["yarn", "linear", "dynamic"] | None = None  # method of --context; default: yarn
    kv_cache_dtype: Literal["auto", "int8"] = "auto"  # dtype of the KV cache; auto: the model's
    prompt_cache: Path | None = None  # a file that keeps the KV cache of a prompt for later runs


@dataclass(frozen=True)
class SpeculativeFlags:
    """Speculative decoding: draft tokens verified in one forward pass, with an unchanged output distribution."""

    num_speculative_tokens: Annotated[int, limits.NUM_SPECULATIVE_TOKENS] = 0  # draft tokens per step (4 to 8); 0: off
    draft_model: str | None = None  # a smaller model with the same tokenizer; default: n-grams of the sequence itself


@dataclass(frozen=True)
class BatchInputFlags:
    """Batch inference from a file. After a kill the same command continues with the prompts that the output lacks."""

    input: Path | None = None  # JSONL: {"prompt": ..} or {"messages": [..]} per line, with optional "id" and options
    output: Path | None = None  # JSONL: one reply per line, in the order in which they finish
    batch_size: Annotated[int | None, limits.BATCH_SIZE] = None  # sequences at a time; default: by free memory


@dataclass(frozen=True)
class GenerateOptions:
    """Complete a prompt, or a file of prompts."""

    loading: LoadingFlags
    prompt: str | None = None  # the text to complete; default: standard input
    ids: Annotated[tuple[int, ...], Range(0)] = ()  # the prompt as token ids, for a model without a tokenizer
    max_tokens: Annotated[int, limits.MAX_TOKENS] = limits.DEFAULT_MAX_TOKENS  # length limit of the reply
    stop: tuple[str, ...] = ()  # strings that end the reply
    ignore_eos: bool = False  # continue after the model's end-of-sequence token
    stream: bool = True  # print text as it is generated
    json: bool = False  # print text, token ids, logprobs and timing as JSON
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    structured_output: StructuredOutputFlags = field(default_factory=StructuredOutputFlags)
    speculative_decoding: SpeculativeFlags = field(default_factory=SpeculativeFlags)
    batch_input: BatchInputFlags = field(default_factory=BatchInputFlags)


@dataclass(frozen=True)
class ChatOptions:
    """Chat with a model in the terminal."""

    loading: LoadingFlags
    system: str | None = None  # the system prompt
    max_tokens: Annotated[int, limits.MAX_TOKENS] = 1024  # length limit of one reply
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    speculative_decoding: SpeculativeFlags = field(default_factory=SpeculativeFlags)


def load_llm(loading: LoadingFlags, speculative: SpeculativeFlags, ranks: ProcessGroup | None = None) -> LLM:
    from oneblock.infer.llm import load
    from oneblock.kernels.huge_pages import MAX_HEAP_ALLOCATION, reuse_memory

    if loading.rope_scaling is not None and loading.context is None:
        raise OneblockError("--rope-scaling has no effect without --context: add --context N")
    if speculative.draft_model is not None and not speculative.num_speculative_tokens:
        raise OneblockError(
            "--draft-model has no effect without --num-speculative-tokens: add --num-speculative-tokens 5"
        )
    if not loading.device.startswith("cuda"):
        reuse_memory(MAX_HEAP_ALLOCATION)
    llm = load(loading.model, loading.dtype, loading.device, ranks)
    llm.compile, llm.kv_cache_dtype, llm.prompt_cache = loading.compile, loading.kv_cache_dtype, loading.prompt_cache
    if loading.context is not None:
        llm.extend_context(loading.context, loading.rope_scaling or "yarn")
    if speculative.num_speculative_tokens:
        draft = speculative.draft_model
        draft_llm = None if draft is None else load(draft, loading.dtype, loading.device)
        llm.set_speculative_decoding(speculative.num_speculative_tokens, draft_llm)
    return llm


# ------------------------------------------------------------------ generate


def generate(options: GenerateOptions) -> None:
    """Run in this process, or on the ranks that torchrun has started; only rank 0 prints."""
    from oneblock.parallel.process_group import init_process_group
    from oneblock.store.load import check_device

    check_device(options.loading.device)
    with (
        init_process_group(options.loading.device) as ranks,
        redirect_stdout(sys.stdout if ranks.rank == 0 else io.StringIO()),
    ):
        run_generate(options, ranks)


def run_generate(options: GenerateOptions, ranks: ProcessGroup) -> None:
    loading, batch = options.loading, options.batch_input
    has_prompt, is_batch = options.prompt is not None or bool(options.ids), batch != BatchInputFlags()
    if ranks.size > 1 and (not has_prompt or is_batch):
        raise OneblockError("with torchrun generate takes one prompt: give --prompt or --ids")
    if ranks.size > 1 and loading.prompt_cache is not None:
        raise OneblockError("--prompt-cache holds the KV cache of one process: leave it out with torchrun")
    if is_batch and (batch.input is None or batch.output is None or has_prompt):
        raise OneblockError("batch inference needs --input and --output, and neither --prompt nor --ids")
    if is_batch and (loading.prompt_cache is not None or options.speculative_decoding.num_speculative_tokens):
        raise OneblockError(
            "--prompt-cache and --num-speculative-tokens apply to one prompt: leave them out with --input"
        )
    prompt = None if is_batch else read_prompt(options)
    llm = load_llm(loading, options.speculative_decoding, ranks)
    sampling = asdict(options.sampling)
    if ranks.size > 1 and options.sampling.seed is None:
        sampling["seed"] = 0  # every rank must sample the same tokens
    request: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "stop": options.stop,
        "ignore_eos": options.ignore_eos,
        **sampling,
        **options.structured_output.to_options(),
    }
    if batch.input is not None and batch.output is not None:
        from oneblock.infer.batch import complete_file

        complete_file(llm, batch.input, batch.output, batch.batch_size, request)
    elif prompt is not None:
        complete_prompt(llm, prompt, request, options)


def complete_prompt(llm: LLM, prompt: str | list[int], request: dict[str, Any], options: GenerateOptions) -> None:
    if options.json:
        start = time.perf_counter()
        print_json(llm.generate(prompt, **request), prompt, time.perf_counter() - start)
        return
    if not options.stream:
        pieces = iter([str(llm.generate(prompt, **request))])
    elif llm.tokenizer:
        pieces = llm.stream(prompt, **request)
    else:
        pieces = (f"{id} " for id in llm.stream_ids(prompt, **request))
    screen = Console(highlight=False)
    if screen.is_terminal and isinstance(prompt, str):
        screen.print(escape(prompt), end="", style="dim", soft_wrap=True)
    print_pieces(pieces)
    print()
    if llm.speculative_stats.drafted:
        Console(stderr=True, highlight=False).print(f"[dim]{llm.speculative_stats}[/]")


def read_prompt(options: GenerateOptions) -> str | list[int]:
    """The prompt of --prompt or --ids, or all of standard input."""
    if options.prompt is not None and options.ids:
        raise OneblockError("give the prompt once: as --prompt or as --ids")
    if options.ids:
        return list(options.ids)
    if options.prompt is not None:
        return options.prompt
    if sys.stdin.isatty():
        raise OneblockError('no prompt: give --prompt "Once upon a time", or text on standard input')
    return sys.stdin.read()


def print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


def print_json(completion: Completion, prompt: str | list[int], seconds: float) -> None:
    row = asdict(completion)
    counts = {"prompt_tokens": len(row.pop("prompt_ids")), "seconds": round(seconds, 3)}
    del row["top_logprobs"]
    print(json.dumps({"prompt": prompt, **row, **counts}, ensure_ascii=False))


# ------------------------------------------------------------------ chat


def chat(options: ChatOptions) -> None:
    from oneblock.infer.chat import Conversation

    screen = Console(highlight=False)
    llm = load_llm(options.loading, options.speculative_decoding)
    if llm.tokenizer is None:
        raise OneblockError(f"{options.loading.model} has no tokenizer to chat with: use oneblock generate --ids")
    request = llm.build_request(max_tokens=options.max_tokens, **asdict(options.sampling))
    conversation = Conversation(llm, request, options.system)
    if screen.is_terminal:
        screen.print(f"[bold]{escape(options.loading.model)}[/]  [dim]/help lists the commands[/]")
    if not conversation.has_template:
        note = "The model has no chat template: it continues your text instead of answering."
        Console(stderr=True, highlight=False).print(f"[dim]{note}[/]", soft_wrap=True)
    run_chat(conversation, screen)


def run_chat(conversation: Conversation, screen: Console) -> None:
    """Read lines and print replies until end of input, /quit, or two interrupts in a row."""
    with suppress(ImportError):  # line editing and history, where Python has readline
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
            if not run_command(line, conversation, screen):
                return
        elif line:
            interrupted = not print_reply(line, conversation, screen)


def run_command(line: str, conversation: Conversation, screen: Console) -> bool:
    """Carry out a /command; False where it ends the chat."""
    name, _, argument = line.partition(" ")
    match name:
        case "/quit" | "/exit":
            return False
        case "/reset":
            conversation.reset()
            screen.print("[dim]new conversation[/]")
        case "/save":
            save_messages(conversation, argument.strip(), screen)
        case "/help":
            screen.print(HELP, markup=False)
        case _:
            screen.print(f"unknown command {name}; /help lists them", markup=False)
    return True


def save_messages(conversation: Conversation, path: str, screen: Console) -> None:
    """Write the messages as JSON, the format of chat templates and training files."""
    if not path:
        screen.print("name a file: /save FILE", markup=False)
        return
    try:
        write_file(path, json.dumps(conversation.messages, indent=1, ensure_ascii=False) + "\n")
    except OneblockError as error:
        screen.print(str(error), markup=False)
        return
    screen.print(f"{len(conversation.messages)} messages written to {path}", markup=False)


def print_reply(line: str, conversation: Conversation, screen: Console) -> bool:
    """Print the reply as it is generated; False where it was interrupted."""
    reply = conversation.stream_reply(line)
    try:
        print_pieces(reply)
        print()
    except KeyboardInterrupt:
        reply.close()  # pyright: ignore[reportAttributeAccessIssue]
        screen.print("\n[dim](stopped)[/]")
        return False
    except OneblockError as error:
        screen.print(f"error: {error} (or /reset)", markup=False, soft_wrap=True)
    return True
