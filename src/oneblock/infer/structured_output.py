"""Structured output: replies that match a JSON schema, a regex, a grammar or one of several choices.

llguidance turns each into a grammar over bytes and computes, for every step, a mask of the allowed tokens. The model's
end-of-text tokens are not part of the grammar: they are allowed wherever the grammar may end. The model picks the
tokenization even when only one string is valid (`no_forcing`).

V: vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from oneblock.errors import OneblockError, missing_extra
from oneblock.text import Tokenizer
from oneblock.text.stream import DETOKENIZER_CONTEXT, TokenBytes

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
# Whitespace between the parts of JSON: none, a space, or a new line. Without a limit a weak model writes only spaces.
JSON_WHITESPACE = {"x-guidance": {"whitespace_pattern": r" |\n {0,40}"}}
LEXER_STATES = 100_000  # 1 to 2 kB each; llguidance's own limits of time per token apply too
ERROR_LENGTH = 60  # characters of the given value that an error repeats
# Bytes of the given value. llguidance follows definitions by recursion; this many fit in STACK_BYTES.
MAX_BYTES = {"schema": 1 << 18, "regex": 1 << 16, "grammar": 1 << 16, "choices": 1 << 22}
STACK_BYTES = 64 << 20  # stack of the thread that compiles a grammar


@dataclass(frozen=True)
class StructuredOutput:
    """The form of the whole reply: exactly one of these."""

    schema: str | Mapping[str, Any] | bool | None = None  # JSON schema, as an object or as text
    regex: str | None = None  # in the syntax of Rust's regex crate: no look-around; \d is 0 to 9
    grammar: str | None = None  # in llguidance's variant of Lark, with the rule `start`
    choices: Sequence[str] | None = None  # one of these strings

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise OneblockError(f"give one of schema, regex, grammar and choices, not {' and '.join(given) or 'none'}")
        try:
            size = len(self.lark.encode())
        except UnicodeEncodeError:
            raise self.error("it contains half of a surrogate pair, which is not valid Unicode: remove it") from None
        if size > MAX_BYTES[self.kind]:
            raise self.error(f"it has {size:,} bytes, over the limit of {MAX_BYTES[self.kind]:,}")

    @cached_property
    def kind(self) -> str:
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @cached_property
    def lark(self) -> str:
        """The equivalent Lark grammar."""
        if self.choices is not None:
            return f"start: CHOICE\nCHOICE: {' | '.join(map(_quote, self._check_choices()))}"
        if self.schema is not None:
            return f"start: %json {self._schema_json()}"
        value = getattr(self, self.kind)
        if not isinstance(value, str):
            raise OneblockError(f"{self.kind} must be a string, not {type(value).__name__}")
        if self.regex is not None:
            return f"start: /{_import_llguidance().regex_to_lark(self.regex, 'd')}/"
        return value

    def _check_choices(self) -> Sequence[str]:
        choices = self.choices
        if isinstance(choices, str) or not choices or not all(isinstance(text, str) and text for text in choices):
            raise OneblockError("choices must be a list of strings: at least one, and none of them empty")
        return choices

    def _schema_json(self) -> str:
        """The schema with the default whitespace pattern, unless it has its own."""
        try:
            schema = json.loads(self.schema) if isinstance(self.schema, str) else self.schema
            if schema is False:
                raise self.error("no string matches it")
            if schema is not True and not isinstance(schema, Mapping):
                raise OneblockError(f"a JSON schema is an object or true, not {json.dumps(schema)[:ERROR_LENGTH]}")
            merged = JSON_WHITESPACE | dict({} if schema is True else schema)
            return json.dumps(merged, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise OneblockError(f"the schema is not valid JSON: {error}") from None

    def error(self, message: str) -> OneblockError:
        """An error of one line: the kind, the start of the given value, the reason."""
        text = self._schema_text() if self.kind == "schema" else str(getattr(self, self.kind))
        text = text if len(text) <= ERROR_LENGTH else text[:ERROR_LENGTH] + ".."
        return OneblockError(f"the {self.kind} {text!r}: {_extract_reason(message)}")

    def _schema_text(self) -> str:
        try:
            return self.schema if isinstance(self.schema, str) else json.dumps(self.schema, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError):
            return "object"


def _quote(text: str) -> str:
    """A Lark string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda control: f"\\u{ord(control[0]):04x}", escaped) + '"'


def _extract_reason(message: str) -> str:
    """The part of llguidance's message that a user can act on, as one line."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines() if line.strip()]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    line = line.removesuffix("<non-verbose/>").split("failed to compile JSON schema: ")[-1]
    line = line.split("(in regex): ")[-1].strip()
    if "NoExtension" in line:
        return "no string matches it"
    if any(words in line for words in ("too many", "max is", "fuel", "too large")):
        return f"it is too complex, reduce its repetitions and alternatives ({line})"
    return line


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise missing_extra("structured output", "llguidance", "structured") from None
    return llguidance


# ------------------------------------------------------------------ the vocabulary as bytes


@dataclass(frozen=True)
class GrammarVocabulary:
    """llguidance's tokenizer for ids 0 to size-1. Its own end-of-text id is `size`, which no model has."""

    tokens: llguidance.LLTokenizer
    size: int
    stripped: tuple[int, ...]  # ids that lose their leading space at the start of a text

    @classmethod
    def get(cls, tokenizer: Tokenizer, size: int) -> GrammarVocabulary:
        """The cached vocabulary of a tokenizer: building a large one takes half a second."""
        cached = _vocabularies.setdefault(tokenizer, {})
        if size not in cached:
            cached[size] = cls._build(tokenizer, size)
        return cached[size]

    @classmethod
    def _build(cls, tokenizer: Tokenizer, size: int) -> GrammarVocabulary:
        token_bytes = TokenBytes(tokenizer.backend)
        spelling = token_bytes.spelling
        if spelling is None or spelling.suffix:
            raise OneblockError("structured output needs a tokenizer that decodes token by token, unlike this one")
        strip, tokens = spelling.strip, [token_bytes[id] for id in range(size)]
        stripped = (id for id in range(size) if strip and token_bytes.strip_leading(id, strip)[0] != tokens[id])
        control = sorted(id for id in tokenizer.special.values() if id < size)
        ll = _import_llguidance()
        adapter = _TokenizerAdapter(tokens, control, tokenizer.backend)
        return cls(
            ll.LLTokenizer(ll.TokenizerWrapper(adapter), n_vocab=size + 1, eos_token=size), size, tuple(stripped)
        )


_vocabularies: WeakKeyDictionary[Tokenizer, dict[int, GrammarVocabulary]] = WeakKeyDictionary()


class _TokenizerAdapter:
    """The interface that llguidance reads a tokenizer through."""

    def __init__(self, tokens: list[bytes], control: list[int], backend: Any):
        self.tokens, self.special_token_ids = [*tokens, b"<end of text>"], [*control, len(tokens)]
        self.eos_token_id, self.bos_token_id, self._backend = len(tokens), None, backend

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokenize forced text, which `no_forcing` avoids."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._backend.encode(text, add_special_tokens=False).ids


def _run_with_large_stack(function: Callable[[], T]) -> T:
    """Call a function in a thread whose stack has STACK_BYTES."""
    with _stack_size, ThreadPoolExecutor(1) as pool:
        before = threading.stack_size(STACK_BYTES)
        try:
            future = pool.submit(function)
        finally:
            threading.stack_size(before)
        return future.result()


_stack_size = threading.Lock()  # the setting belongs to the whole process


# ------------------------------------------------------------------ matchers


class CompiledGrammar:
    """A structured output compiled for a vocabulary, which allows at least one first token."""

    def __init__(self, output: StructuredOutput, tokenizer: Tokenizer, vocab: int):
        self.output, self.tokenizer = output, tokenizer
        self.vocabulary = GrammarVocabulary.get(tokenizer, vocab)
        self._initial = _run_with_large_stack(self._compile)
        self.start_matcher().allowed_tokens()

    def _compile(self) -> llguidance.LLMatcher:
        ll = _import_llguidance()
        limits = ll.LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
        matcher = ll.LLMatcher(self.vocabulary.tokens, self.output.lark + NO_FORCING, log_level=0, limits=limits)
        matcher.compute_bitmask()
        matcher.reset()
        return matcher

    def start_matcher(
        self, prompt: Sequence[int] | None = None, stop_ids: frozenset[int] = frozenset()
    ) -> GrammarMatcher:
        """A matcher at the start of a reply. After a prompt without visible text the first space is stripped."""
        size, stripped = self.vocabulary.size, self.vocabulary.stripped
        if prompt is None or self.tokenizer.decode(prompt[-DETOKENIZER_CONTEXT:]):
            stripped = ()
        ids = sorted(id for id in stop_ids if id < size)
        return GrammarMatcher(self, self._initial.deep_copy(), stripped, ids)


class Ending(IntEnum):
    """How a token ends a reply by its grammar."""

    NONE = 0
    BEFORE_TOKEN = 1  # the token is not part of the text, like an end-of-text token
    AFTER_TOKEN = 2  # no token can follow


class GrammarMatcher:
    """The position of one reply in the grammar.

    Without an end-of-text token, a choice that is a prefix of another ends where the model would not continue it: the
    next token is sampled from the whole vocabulary, and one that continues no choice ends the reply.
    """

    def __init__(
        self, grammar: CompiledGrammar, state: llguidance.LLMatcher, not_first: Sequence[int], stop_ids: Sequence[int]
    ):
        """`not_first`: ids that cannot be the first token. `stop_ids`: the end-of-text ids."""
        self.grammar, self._state, self._not_first, self._stop_ids = grammar, state, list(not_first), list(stop_ids)
        self._check()

    def allowed_tokens(self) -> Tensor:
        """The ids that may come next, bool (V,), with the end-of-text ids where the reply may end."""
        bits = torch.frombuffer(bytearray(self._state.compute_bitmask()), dtype=torch.uint8)
        self._check()
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()
        allowed = allowed[: self.grammar.vocabulary.size]
        allowed[self._not_first] = False
        if self._ends_by_any_token:
            allowed[:] = True
        allowed[self._stop_ids] = self._state.is_accepting()
        return allowed

    def accept_token(self, id: int) -> Ending:
        """Advance by an allowed token; how it ends the reply."""
        if id in self._stop_ids or (self._ends_by_any_token and not self._state.validate_tokens([id])):
            return Ending.BEFORE_TOKEN
        self._not_first = []
        self._state.consume_token(id)
        self._check()
        return Ending.AFTER_TOKEN if self._state.is_stopped() else Ending.NONE

    @property
    def _ends_by_any_token(self) -> bool:
        return not self._stop_ids and self.grammar.output.choices is not None and self._state.is_accepting()

    def _check(self) -> None:
        if self._state.is_error():
            raise self.grammar.output.error(self._state.get_error())
