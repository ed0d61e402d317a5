"""`LLM`: a loaded model and its tokenizer, text in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, Unpack, overload

import torch

from oneblock import store
from oneblock.config import check_range
from oneblock.errors import OneblockError
from oneblock.infer import generate as decoding
from oneblock.infer import options as opts
from oneblock.infer.extend_context import ScalingMethod, extend_context
from oneblock.infer.generate import Request, Sequences, TokenOutput
from oneblock.infer.options import OPTIONS, Options, StructuredOutputOptions
from oneblock.infer.prepare import prepare_for_inference
from oneblock.infer.prompt_cache import check_prompt_cache_path, load_prompt_cache, save_prompt_cache
from oneblock.infer.speculate import SpeculativeDecoder, SpeculativeStats
from oneblock.infer.stop import FinishReason, Reply
from oneblock.infer.structured_output import CompiledGrammar, StructuredOutput
from oneblock.kernels.build import has_compiler
from oneblock.kernels.fast_model import use_fast_kernels
from oneblock.kernels.huge_pages import BREAK_EVEN_TOKENS, PROMPT_TOKENS, move_to_huge_pages
from oneblock.model import Decoder
from oneblock.model.context import reference_attention
from oneblock.parallel.process_group import ProcessGroup
from oneblock.quant.quantize import quant_config
from oneblock.spec import Spec
from oneblock.store.load import Checkpoint, check_device
from oneblock.store.name_tables import Layout
from oneblock.store.quantized import load_quantized, stored_quant_config, write_quantized
from oneblock.store.save import write_model
from oneblock.text import Tokenizer
from oneblock.text.stream import DETOKENIZER_CONTEXT

if TYPE_CHECKING:
    from oneblock.kernels.compiled_step import CompiledStep

Ids: TypeAlias = "list[int]"
Prompts: TypeAlias = "str | Ids | list[str] | list[Ids]"
Message: TypeAlias = "dict[str, Any]"

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "encoder.json", "*.tiktoken")


CHOICES = {"compile": ("auto", "on", "off"), "kv_cache_dtype": ("auto", "int8")}  # settings of an LLM


@dataclass(frozen=True)
class Completion:
    """A reply. `ids` includes a stop token; `text` excludes stop strings."""

    text: str | None  # None: the model has no tokenizer
    ids: list[int]
    logprobs: list[float]  # of each id in the model's own distribution, before temperature, penalties and filters
    finish_reason: FinishReason
    prompt_ids: list[int] = field(repr=False, default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(repr=False, default_factory=list)

    def __str__(self) -> str:
        return str(self.ids) if self.text is None else self.text


class LLM:
    """A model and its tokenizer, with the defaults of its folder's `generation_config.json`.

    Calls may come from several threads: each has its own state, and forward passes take turns.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        layout: Layout | None = None,
    ):
        if model.attention_backend is reference_attention:
            use_fast_kernels(model)
        self.model, self.tokenizer = model, tokenizer
        self.config, self.generation_config = dict(config or {}), dict(generation_config or {})
        self._layout = layout  # tensor names and shards of the folder, for `save`
        self._compiled: CompiledStep | None = None
        self._tokens_seen, self._in_huge_pages = 0.0, False
        self.compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the decode step; auto: if it pays off
        self.kv_cache_dtype: Literal["auto", "int8"] = "auto"  # auto: the model's dtype; int8: half the memory of bf16
        self.prompt_cache: str | Path | None = None  # a file that keeps the KV cache of single prompts between runs
        self.num_speculative_tokens = 0
        self.draft_model: LLM | None = None
        self.speculative_stats = SpeculativeStats()  # since speculative decoding was configured

    def __repr__(self) -> str:
        spec, model = self.spec, self.model
        return f"LLM({spec.n_layers} layers, dim {spec.dim}, vocabulary {spec.vocab}, {model.dtype}, {model.device})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise OneblockError(
            "an LLM cannot be pickled or copied: share it between threads, or save it and load it again"
        )

    @property
    def spec(self) -> Spec:
        return self.model.spec

    @property
    def eos_ids(self) -> frozenset[int]:
        """The end-of-sequence ids of tokenizer, config and generation config."""
        ids = set(self.tokenizer.eos_ids) if self.tokenizer else set()
        for source in (self.config, self.generation_config):
            eos = source.get("eos_token_id")
            ids.update([eos] if isinstance(eos, int) else eos or [])
        return frozenset(ids)

    # ------------------------------------------------------------------ settings

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; settings are checked."""
        if name in CHOICES and value not in CHOICES[name]:
            raise OneblockError(f"{name} is {value!r}, but it must be {' or '.join(CHOICES[name])}")
        if name == "prompt_cache" and value is not None:
            check_prompt_cache_path(value)
        super().__setattr__(name, value)

    def set_speculative_decoding(self, num_speculative_tokens: int, draft_model: LLM | None = None) -> None:
        """Draft this many tokens per step for single prompts: by a smaller model, or by n-grams of the sequence.

        The output distribution is unchanged. 0 switches it off. OneblockError where the vocabularies differ.
        """
        check_range("num_speculative_tokens", num_speculative_tokens, opts.NUM_SPECULATIVE_TOKENS, int)
        if draft_model is not None:
            if not isinstance(draft_model, LLM):
                raise OneblockError(f"draft_model is {draft_model!r}, but it must be an LLM: give load(path)")
            vocab, draft_vocab = self.spec.vocab, draft_model.spec.vocab
            if vocab != draft_vocab:
                raise OneblockError(
                    f"the draft model's vocabulary has {draft_vocab} tokens and the model's {vocab}: "
                    f"use a draft model with the same tokenizer"
                )
        self.num_speculative_tokens, self.draft_model = num_speculative_tokens, draft_model
        self.speculative_stats = SpeculativeStats()

    def extend_context(self, context: int, rope_scaling: ScalingMethod = "yarn") -> None:
        """Allow sequences of `context` tokens by RoPE scaling."""
        extend_context(self.model, context, rope_scaling)
        self.config = {}  # of the unscaled model

    # ------------------------------------------------------------------ text to ids

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's token ids; the BOS token for empty text. Ids are returned as they are."""
        if isinstance(prompt, Mapping):
            raise OneblockError("the prompt is a message: use llm.chat(messages)")
        if not isinstance(prompt, str):
            if isinstance(prompt, bytes) or not hasattr(prompt, "__iter__"):
                raise OneblockError(f"the prompt is {prompt!r}, but it must be text or a list of token ids")
            return [int(i) if hasattr(i, "__index__") and not isinstance(i, bool) else i for i in prompt]
        if self.tokenizer is None:
            raise OneblockError("the model's folder has no tokenizer: give the prompt as a list of token ids")
        ids = self.tokenizer.encode(prompt)
        return ids or ([] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, by the tokenizer's chat template."""
        if self.tokenizer is None:
            raise OneblockError("chat needs a tokenizer, which the model's folder lacks: use generate with token ids")
        if not is_conversation(messages):
            raise OneblockError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
        return self.tokenizer.chat(list(messages))

    def start_reply(self, prompt: Sequence[int], request: Request) -> Reply:
        """A reply whose detokenizer has read the prompt's end: it keeps spaces between words, completes characters."""
        detokenizer = None if self.tokenizer is None else self.tokenizer.stream()
        if detokenizer is not None:
            for id in prompt[-DETOKENIZER_CONTEXT:]:
                detokenizer.push(id)
        return decoding.start_reply(self.spec, prompt, request, detokenizer)

    # ------------------------------------------------------------------ options

    def build_request(self, batch: int = 1, **options: Unpack[Options]) -> Request:
        """The checked options of `batch` prompts, with the model's own defaults for those that are not given."""
        unknown = next((name for name in options if name not in OPTIONS), None)
        if unknown is not None:
            raise TypeError(f"unknown argument {unknown!r}; known: {', '.join(sorted(OPTIONS))}")
        stop, stop_ids = options.get("stop") or (), options.get("stop_ids") or ()
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise OneblockError(f"stop is {stop!r}, but it must be a string or a list of strings")
        if not isinstance(stop_ids, list | tuple | set | frozenset) or not all(type(id) is int for id in stop_ids):
            raise OneblockError(f"stop_ids is {stop_ids!r}, but it must be a list of token ids")
        if self.tokenizer is None and any(stop):
            raise OneblockError("stop strings need a tokenizer, which the model's folder lacks: use stop_ids")
        ignore_eos = options.get("ignore_eos", False)
        if not isinstance(ignore_eos, bool):
            raise OneblockError(f"ignore_eos is {ignore_eos!r}, but it must be true or false")
        return Request(
            sampling=opts.build_sampling_params(options, self.generation_config),
            max_tokens=options.get("max_tokens", opts.DEFAULT_MAX_TOKENS),
            stop_ids=frozenset(stop_ids) | (frozenset() if ignore_eos else self.eos_ids),
            stop=tuple(stop),
            seeds=opts.derive_seeds(options.get("seed"), batch),
            top_logprobs=options.get("top_logprobs", 0),
            grammar=self._compile_grammar(options),
        )

    def _compile_grammar(self, options: Mapping[str, Any]) -> CompiledGrammar | None:
        given = {n: options[n] for n in StructuredOutputOptions.__annotations__ if options.get(n) is not None}
        if not given:
            return None
        if self.tokenizer is None:
            raise OneblockError(f"{next(iter(given))} needs a tokenizer, which the model's folder lacks")
        return CompiledGrammar(StructuredOutput(**given), self.tokenizer, self.spec.vocab)

    # ------------------------------------------------------------------ generate

    @overload
    def generate(self, prompts: str | list[int], **options: Unpack[Options]) -> Completion: ...

    @overload
    def generate(self, prompts: list[str] | list[list[int]], **options: Unpack[Options]) -> list[Completion]: ...

    def generate(self, prompts: Prompts, **options: Unpack[Options]) -> Completion | list[Completion]:
        """Complete text or token ids: one `Completion`; for a list of prompts a list of them, decoded as one batch.

        llm.generate("Once upon a time", max_tokens=64, temperature=0.8, top_p=0.95, seed=1).text

        Options: see `Options`, `SamplingParams` and `StructuredOutput`. Temperature 0 is greedy. Temperature, top_k,
        top_p and min_p default to `generation_config.json` where it samples, else to 1 and no filter.
        """
        if isinstance(prompts, Mapping) or not hasattr(prompts, "__getitem__"):
            raise OneblockError(f"the prompt is {prompts!r}, but it must be text or a list of token ids")
        single = isinstance(prompts, str) or bool(len(prompts) and hasattr(prompts[0], "__index__"))
        batch = [self.encode(p) for p in ([prompts] if single else prompts)]  # pyright: ignore[reportArgumentType]
        completions = self._complete(batch, self.build_request(len(batch), **options))
        return completions[0] if single else completions

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Completion:
        """The reply to a conversation `[{"role": "user", "content": ".."}, ..]`, by the tokenizer's chat template."""
        return self._complete([self.encode_messages(messages)], self.build_request(**options))[0]

    def stream(self, prompt: str | list[int] | list[Message], **options: Unpack[Options]) -> Iterator[str]:
        """The reply to one prompt or conversation as pieces of text, each of whole characters."""
        if self.tokenizer is None:
            raise OneblockError("the model's folder has no tokenizer to stream text with: use stream_ids")
        return (output.text for output in self._stream(prompt, options) if output.text)

    def stream_ids(self, prompt: str | list[int] | list[Message], **options: Unpack[Options]) -> Iterator[int]:
        """The token ids of the reply, each as soon as it is sampled."""
        return (output.id for output in self._stream(prompt, options))

    def _stream(self, prompt: str | list[int] | list[Message], options: Options) -> Iterator[TokenOutput]:
        """Prompt and options are checked before the first token is asked for."""
        ids = self.encode_messages(prompt) if is_conversation(prompt) else self.encode(prompt)  # pyright: ignore
        return self._generate([ids], self.build_request(**options))

    def _complete(self, prompts: Sequence[list[int]], request: Request) -> list[Completion]:
        if not prompts:
            return []
        rows: list[list[TokenOutput]] = [[] for _ in prompts]
        for output in self._generate(prompts, request):
            rows[output.row].append(output)
        return [self._build_completion(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]

    def _build_completion(self, prompt: list[int], outputs: list[TokenOutput]) -> Completion:
        finish_reason = outputs[-1].finish_reason
        assert finish_reason is not None, "the sequence has not finished"
        return Completion(
            text=None if self.tokenizer is None else "".join(output.text for output in outputs),
            ids=[output.id for output in outputs],
            logprobs=[output.logprob for output in outputs if output.logprob is not None],
            finish_reason=finish_reason,
            prompt_ids=list(prompt),
            top_logprobs=[output.top for output in outputs if output.top],
        )

    def _generate(self, prompts: Sequence[list[int]], request: Request) -> Iterator[TokenOutput]:
        return self.generate_tokens(self.allocate_sequences(prompts, request), request)

    def allocate_sequences(self, prompts: Sequence[list[int]], request: Request) -> Sequences:
        """A checked batch with an empty KV cache for prompts and replies."""
        decoding.check_request(self.spec, prompts, request)
        longest = max(map(len, prompts), default=0)
        new = max((decoding.remaining_tokens(self.spec, p, request.max_tokens) for p in prompts), default=0)
        compiled = self.prepare_decoding(new, sum(map(len, prompts)))
        return Sequences(self.model, prompts, longest + new, compiled, self.kv_cache_dtype == "int8")

    def generate_tokens(self, sequences: Sequences, request: Request) -> Iterator[TokenOutput]:
        """Decode a batch; a batch of one with speculative decoding and the prompt cache where these are on."""
        replies = [self.start_reply(row, request) for row in sequences.rows]
        if len(replies) > 1 or not self.num_speculative_tokens:
            outputs = decoding.generate_tokens(sequences, request, replies)
        else:
            draft_model = None if self.draft_model is None else self.draft_model.model
            decoder = SpeculativeDecoder(sequences, request, replies[0], draft_model, self.speculative_stats)
            outputs = decoder.generate_tokens(self.num_speculative_tokens)
        if len(replies) > 1 or self.prompt_cache is None:
            return outputs
        return self._with_prompt_cache(Path(self.prompt_cache), sequences, outputs)

    def _with_prompt_cache(
        self, path: Path, sequences: Sequences, outputs: Iterator[TokenOutput]
    ) -> Iterator[TokenOutput]:
        """The same outputs; the KV cache is loaded before the first and saved after the last."""
        if path.exists() and not sequences.cache.length:
            load_prompt_cache(path, sequences)
        yield from outputs
        save_prompt_cache(path, sequences)

    # ------------------------------------------------------------------ speed

    def prepare_decoding(self, new_tokens: int, prompt_tokens: int = 0) -> CompiledStep | None:
        """Move weights to huge pages and compile the decode step, where the tokens to come repay it."""
        with decoding.FORWARD_LOCK:
            self._tokens_seen += new_tokens + prompt_tokens / PROMPT_TOKENS
            if self._tokens_seen >= BREAK_EVEN_TOKENS and not self._in_huge_pages:
                move_to_huge_pages(self.model)
                self._in_huge_pages = True
            return self.compile_step(new_tokens)

    def compile_step(self, new_tokens: int) -> CompiledStep | None:
        """The compiled decode step, where `compile` asks for it or so many tokens repay it; else None."""
        from oneblock.kernels.compiled_step import CompiledStep, is_worth_compiling

        if self._compiled is None and self.compile == "on" and not has_compiler():
            warnings.warn("no C++ compiler was found: steps are not compiled (install g++)", stacklevel=2)
            self.compile = "off"
        if self.compile == "off" or (
            self.compile == "auto" and not is_worth_compiling(self.spec, new_tokens, self.model.device)
        ):
            return self._compiled if self.compile == "auto" else None
        self._compiled = self._compiled or CompiledStep(self.model)
        return self._compiled

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: config, weights, tokenizer; an existing one is replaced in one step."""
        checkpoint = Checkpoint(self.model, self.spec, self.config, self.generation_config, self._layout)
        with store.replace_model_folder(folder) as new:
            if quant := quant_config(self.model):
                write_quantized(new, checkpoint, quant)
            else:
                write_model(new, checkpoint)
            if self.tokenizer is not None:
                self.tokenizer.save(new)


def is_conversation(prompt: object) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


# ------------------------------------------------------------------ loading


def load(
    path_or_name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ranks: ProcessGroup | None = None,
) -> LLM:
    """Load a folder or a .gguf file, or `org/name[@revision]` from the hub; dtype None: as it is stored.

    llm = oneblock.load("path/or/org/name", dtype="bfloat16", device="cpu")

    `ranks`: this process's tensor-parallel shard, under torchrun; no device holds the whole model.
    """
    device = check_device(device)
    sharded = ranks is not None and ranks.size > 1
    checkpoint, tokenizer = read_checkpoint(store.resolve(path_or_name), dtype, "cpu" if sharded else device)
    prepare_for_inference(checkpoint.model, ranks=ranks, device=device if sharded else None)
    return LLM(checkpoint.model, tokenizer, checkpoint.config, checkpoint.generation, checkpoint.layout)


def read_checkpoint(
    path: Path, dtype: str | torch.dtype | None, device: str | torch.device
) -> tuple[Checkpoint, Tokenizer | None]:
    """Model and tokenizer of a folder, a quantized folder or a GGUF file."""
    if path.suffix == ".gguf":
        from oneblock.store.gguf import load_gguf  # needs the optional package gguf

        return load_gguf(path, dtype, device)
    if quant := stored_quant_config(path):
        return load_quantized(path, quant, dtype, device), load_tokenizer(path)
    return store.load_model(path, dtype, device), load_tokenizer(path)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer; None where it has no tokenizer file."""
    has_tokenizer = any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES)
    return Tokenizer.load(folder) if has_tokenizer else None
