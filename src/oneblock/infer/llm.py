"""A loaded model: text in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack, overload

from oneblock import store
from oneblock.errors import OneblockError
from oneblock.infer.extend_context import extend_context
from oneblock.infer.generate import Request, Sequences, TokenOutput, check, events, remaining_tokens
from oneblock.infer.prompt_cache import keep, take
from oneblock.infer.sample import SamplingOptions, SamplingParams
from oneblock.infer.speculate import ModelDrafter, NgramDrafter, SpeculativeStats, check_alike, speculated
from oneblock.infer.stop import CONTEXT_OF_TEXT, Detokenizer, Finish
from oneblock.infer.structured_output import CompiledGrammar, StructuredOutput, StructuredOutputOptions
from oneblock.kernels.compiler import compiler_found
from oneblock.kernels.cpu_modules import optimize_for_cpu
from oneblock.kernels.huge_pages import PROMPT, REPAYS, settle
from oneblock.model import Decoder
from oneblock.parallel.process_group import ProcessGroup
from oneblock.parallel.tensor_parallel import TensorParallel
from oneblock.quant.quantize import bits_of, load_quantized, quantized, write_quantized
from oneblock.spec import Spec
from oneblock.store.load import Checkpoint
from oneblock.store.name_tables import Layout
from oneblock.store.save import write_model
from oneblock.text import Tokenizer

if TYPE_CHECKING:
    import torch

    from oneblock.kernels.compiled_step import Compiled

Ids: TypeAlias = "list[int]"
Prompts: TypeAlias = "str | Ids | list[str] | list[Ids]"
Message: TypeAlias = "dict[str, Any]"

MAX_TOKENS = 256
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "encoder.json", "*.tiktoken")


class Options(SamplingOptions, StructuredOutputOptions, total=False):
    """What `generate`, `stream` and `chat` take, besides how to choose a token and what the reply must be."""

    max_tokens: int | None  # default 256; None: as many as the context holds
    stop: str | Sequence[str]  # texts that end the reply and are not part of it
    stop_ids: Sequence[int]  # ids that end it, besides the model's own
    ignore_eos: bool  # go on past the model's own
    seed: int | Sequence[int] | None  # prompt i of a list draws from seed + i; a list gives each its own
    top_logprobs: int  # also give this many of the likeliest tokens at each place


OPTIONS = frozenset(Options.__annotations__)


@dataclass(frozen=True)
class Completion:
    """A reply. `ids` has every token, the one that stopped it included; `text` has what may be shown."""

    text: str | None  # None: the model has no tokenizer
    ids: list[int]
    logprobs: list[float]  # of each id in the model's own distribution, before temperature, penalties and cuts
    finish_reason: Finish
    prompt_ids: list[int] = field(repr=False, default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(repr=False, default_factory=list)

    def __str__(self) -> str:
        return str(self.ids) if self.text is None else self.text


class LLM:
    """A model, its tokenizer, and the habits its folder records (`generation_config.json`)."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        config: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        layout: Layout | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.config, self.generation = dict(config or {}), dict(generation or {})
        self._layout = layout  # how the folder named and split its tensors
        self.compile: Literal["auto", "on", "off"] = "auto"  # a token's step as one graph; auto: where it pays
        self._compiled: Compiled | None = None
        self._used, self._settled = 0.0, False  # tokens, and whether the weights are in large pages
        self.kv_cache_dtype: Literal["auto", "int8"] = "auto"  # auto: the dtype of the model
        self.num_speculative_tokens = 0  # tokens guessed at a time for single texts (infer/speculate.py); 0: none
        self.draft_model: LLM | None = None  # who guesses; None: the text itself
        self.speculative_stats = SpeculativeStats()  # of the last text that was guessed
        self.prompt_cache: Path | None = None  # a file that keeps single texts' keys and values between runs

    def __repr__(self) -> str:
        spec, model = self.spec, self.model
        return f"LLM({spec.n_layers} layers of {spec.dim}, vocabulary {spec.vocab}, {model.dtype}, {model.device})"

    @property
    def spec(self) -> Spec:
        return self.model.spec

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids with which the model ends a text, as tokenizer and folder know them."""
        found = set(self.tokenizer.eos_ids) if self.tokenizer else set()
        for source in (self.config, self.generation):
            ids = source.get("eos_token_id")
            found.update([ids] if isinstance(ids, int) else ids or [])
        return frozenset(found)

    # ------------------------------------------------------------------ text to ids

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's ids; an empty text is the token that begins one. Ids stay as they are."""
        if not isinstance(prompt, str):
            return [int(i) if hasattr(i, "__index__") and not isinstance(i, bool) else i for i in prompt]
        if self.tokenizer is None:
            raise OneblockError("the model's folder has no tokenizer: give the prompt as a list of ids")
        ids = self.tokenizer.encode(prompt)
        return ids or ([] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id])

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer | None:
        """Ids to text for what follows the prompt: spaces between words are kept, half characters completed."""
        if self.tokenizer is None:
            return None
        stream = self.tokenizer.stream()
        for id in prompt[-CONTEXT_OF_TEXT:]:
            stream.push(id)
        return stream

    def request(self, rows: int = 1, **options: Unpack[Options]) -> Request:
        """The options checked, with the model's own defaults where nothing is asked for."""
        unknown = next((name for name in options if name not in OPTIONS), None)
        if unknown is not None:
            raise TypeError(f"unknown argument {unknown!r}; known: {', '.join(sorted(OPTIONS))}")
        stop = options.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if self.tokenizer is None and any(stop):
            raise OneblockError("stop texts need a tokenizer, which the model's folder lacks: use stop_ids")
        eos = frozenset() if options.get("ignore_eos", False) else self.eos_ids
        return Request(
            sampling=self._sampling(options),
            max_tokens=options.get("max_tokens", MAX_TOKENS),
            stop_ids=eos | frozenset(options.get("stop_ids") or ()),
            stop=stop,
            seeds=_seeds(options.get("seed"), rows),
            logprobs=options.get("top_logprobs", 0),
            grammar=self._grammar(options),
        )

    def _grammar(self, options: Mapping[str, Any]) -> CompiledGrammar | None:
        asked = {
            name: options[name] for name in StructuredOutputOptions.__annotations__ if options.get(name) is not None
        }
        if not asked:
            return None
        if self.tokenizer is None:
            raise OneblockError(f"{next(iter(asked))} needs a tokenizer, which the model's folder lacks")
        return CompiledGrammar(StructuredOutput(**asked), self.tokenizer, self.spec.vocab)

    def _sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        names = ["repetition_penalty"]
        if self.generation.get("do_sample"):
            names += ["temperature", "top_k", "top_p", "min_p"]
        own = {name: self.generation.get(name) for name in names}
        asked = {name: options.get(name) for name in SamplingOptions.__annotations__}
        chosen = {name: value for values in (own, asked) for name, value in values.items() if value is not None}
        return SamplingParams(**chosen)

    # ------------------------------------------------------------------ generate

    @overload
    def generate(self, prompts: str | list[int], **options: Unpack[Options]) -> Completion: ...

    @overload
    def generate(self, prompts: list[str] | list[list[int]], **options: Unpack[Options]) -> list[Completion]: ...

    def generate(self, prompts: Prompts, **options: Unpack[Options]) -> Completion | list[Completion]:
        """Continue a text or a list of ids: one completion; a list of them: one for each, computed together.

        llm.generate("Once upon a time", max_tokens=64, temperature=0.8, top_p=0.95, seed=1).text

        Options: see `Options`, `Sampling` and `Constraint`. Temperature 0 always takes the likeliest token. Left out,
        temperature, top_k, top_p and min_p are those of `generation_config.json` where it samples, else 1 and no cuts.
        """
        single = isinstance(prompts, str) or bool(len(prompts) and hasattr(prompts[0], "__index__"))
        rows = [self.encode(p) for p in ([prompts] if single else prompts)]  # pyright: ignore[reportArgumentType]
        found = self._complete(rows, self.request(len(rows), **options))
        return found[0] if single else found

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Completion:
        """The reply to a conversation `[{"role": "user", "content": ".."}, ..]`, by the tokenizer's chat template."""
        return self._complete([self._conversation(messages)], self.request(**options))[0]

    def stream(self, prompt: str | list[int] | list[Message], **options: Unpack[Options]) -> Iterator[str]:
        """The same for one prompt or conversation, piece by piece. Never half a character."""
        if self.tokenizer is None:
            raise OneblockError("the model's folder has no tokenizer to stream text with: use stream_ids")
        return (event.text for event in self._events(prompt, options) if event.text)

    def stream_ids(self, prompt: str | list[int] | list[Message], **options: Unpack[Options]) -> Iterator[int]:
        """The ids of `stream`, each as soon as it is chosen."""
        return (event.id for event in self._events(prompt, options))

    def _events(self, prompt: str | list[int] | list[Message], options: Options) -> Iterator[TokenOutput]:
        """The prompt is checked here, before the first piece is asked for."""
        ids = self._conversation(prompt) if _is_conversation(prompt) else self.encode(prompt)  # pyright: ignore
        request = self.request(**options)
        return self._run([ids], request)

    def _conversation(self, messages: Sequence[Message]) -> list[int]:
        if self.tokenizer is None:
            raise OneblockError("the model's folder has no tokenizer to chat with: use generate with a list of ids")
        return self.tokenizer.chat(list(messages))

    def texts(self, prompts: Sequence[list[int]], request: Request) -> Sequences:
        """A batch ready to run, with room for what may come."""
        check(self.spec, prompts, request)
        longest = max(map(len, prompts), default=0)
        more = max((remaining_tokens(self.spec, p, request.max_tokens) for p in prompts), default=0)
        self._used += sum(map(len, prompts)) / PROMPT
        return Sequences(self.model, prompts, longest + more, self.ready(more), self.kv_cache_dtype == "int8")

    def _run(self, prompts: Sequence[list[int]], request: Request) -> Iterator[TokenOutput]:
        return self.run(self.texts(prompts, request), request, [self.detokenizer(prompt) for prompt in prompts])

    def run(
        self, texts: Sequences, request: Request, detokenizers: Sequence[Detokenizer | None]
    ) -> Iterator[TokenOutput]:
        """The texts' tokens as they come; of a single text guessed, and kept on disk, where that was asked for."""
        if len(texts.rows) > 1:
            return events(texts, request, detokenizers)
        found = (
            self._guessed(texts, request, detokenizers[0])
            if self.num_speculative_tokens
            else events(texts, request, detokenizers)
        )
        return found if self.prompt_cache is None else self._kept(self.prompt_cache, texts, found)

    def _kept(self, path: Path, texts: Sequences, found: Iterator[TokenOutput]) -> Iterator[TokenOutput]:
        """The same, begun from the file where it has the text's beginning, and written to it at the end."""
        if path.exists() and not texts.cache.length:
            take(path, texts)
        yield from found
        keep(path, texts)

    def _guessed(self, texts: Sequences, request: Request, detokenizer: Detokenizer | None) -> Iterator[TokenOutput]:
        self.speculative_stats = SpeculativeStats()
        seed = request.seeds[0] if request.seeds else 0
        drafter = (
            NgramDrafter()
            if self.draft_model is None
            else ModelDrafter(self.draft_model.model, request.sampling, seed + 1)
        )
        return speculated(texts, request, detokenizer, drafter, self.num_speculative_tokens, self.speculative_stats)

    def set_speculative_decoding(self, num_speculative_tokens: int, draft_model: LLM | None = None) -> None:
        """From now on guess n tokens of single texts at a time: by a smaller model, or by what the text has repeated.

        The distribution stays the same; passes get fewer where guesses are good. OneblockError where the draft has
        another vocabulary.
        """
        if draft_model is not None:
            check_alike(self.model, draft_model.model)
        self.num_speculative_tokens, self.draft_model = num_speculative_tokens, draft_model

    def extend_context(self, context: int, rope_scaling: Literal["yarn", "linear", "dynamic"] = "yarn") -> None:
        """Make room for texts of so many tokens by RoPE scaling (infer/longer.py)."""
        extend_context(self.model, context, rope_scaling)
        self.config = {}  # it describes another model now

    def ready(self, tokens: int) -> Compiled | None:
        """For so many tokens to come: the weights in large pages, and the step as one graph, where that is repaid."""
        self._used += tokens
        if self._used >= REPAYS and not self._settled:
            settle(self.model)
            self._settled = True
        return self.compiled(tokens)

    def compiled(self, tokens: int) -> Compiled | None:
        """The step as one graph, where it was asked for or so many tokens repay its making."""
        from oneblock.kernels.compiled_step import Compiled, pays

        if self._compiled is None and self.compile == "on" and not compiler_found():
            warnings.warn("no C++ compiler was found: steps are not compiled (install g++)", stacklevel=2)
            self.compile = "off"
        if self.compile == "off" or (self.compile == "auto" and not pays(self.spec, tokens, self.model.device)):
            return self._compiled if self.compile == "auto" else None
        self._compiled = self._compiled or Compiled(self.model)
        return self._compiled

    def _complete(self, prompts: Sequence[list[int]], request: Request) -> list[Completion]:
        if not prompts:
            return []
        rows: list[list[TokenOutput]] = [[] for _ in prompts]
        for event in self._run(prompts, request):
            rows[event.row].append(event)
        return [self._completion(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]

    def _completion(self, prompt: list[int], row: list[TokenOutput]) -> Completion:
        finish = row[-1].finish
        assert finish is not None, "a reply that has not ended"
        return Completion(
            text=None if self.tokenizer is None else "".join(event.text for event in row),
            ids=[event.id for event in row],
            logprobs=[event.logprob for event in row if event.logprob is not None],
            finish_reason=finish,
            prompt_ids=list(prompt),
            top_logprobs=[event.top for event in row if event.top],
        )

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: configuration, weights, tokenizer; the old one stays until the new is whole."""
        with store.replace_model_folder(folder) as new:
            if bits := bits_of(self.model):
                write_quantized(new, self.model, bits, self.config, self.generation)
            else:
                write_model(new, self.model, self.config or None, self.generation or None, layout=self._layout)
            if self.tokenizer is not None:
                self.tokenizer.save(new)


def _is_conversation(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _seeds(seed: int | Sequence[int] | None, rows: int) -> tuple[int, ...]:
    if seed is None:
        return ()
    seeds = tuple(seed + i for i in range(rows)) if isinstance(seed, int) else tuple(seed)
    if len(seeds) != rows or not all(isinstance(s, int) for s in seeds):
        raise OneblockError(f"seed must be one whole number, or a list of {rows}: one for each prompt")
    return seeds


def load(
    path_or_name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ranks: ProcessGroup | None = None,
) -> LLM:
    """A model from a folder or a .gguf file, or from the hub by `org/name[@revision]`; dtype None: as it is stored.

    llm = oneblock.load("path/or/org/name", dtype="bfloat16", device="cpu")

    `ranks`: load this rank's shard for tensor parallelism under torchrun; the device never holds the full model.
    """
    several = ranks is not None and ranks.size > 1
    found, tokenizer = read(store.resolve(str(path_or_name)), dtype, "cpu" if several else device)
    if ranks is not None and several:
        TensorParallel(ranks).shard_decoder(found.model)
        found.model.to(device)
    optimize_for_cpu(found.model)
    return LLM(found.model, tokenizer, found.config, found.generation, found.layout)


def read(
    path: Path, dtype: str | torch.dtype | None, device: str | torch.device
) -> tuple[Checkpoint, Tokenizer | None]:
    """Plain folders, folders of codes, GGUF files."""
    if path.suffix == ".gguf":
        from oneblock.store.gguf import load_gguf  # its library is an extra

        return load_gguf(path, dtype, device)
    if bits := quantized(store.read_config(path)[1]):
        return load_quantized(path, bits, dtype, device), find_tokenizer(path)
    return store.load_model(path, dtype, device), find_tokenizer(path)


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer; None where it has no file of one. A file that cannot be read is an error."""
    found = any(next(folder.glob(pattern), None) for pattern in TOKENIZERS)
    return Tokenizer.load(folder) if found else None
