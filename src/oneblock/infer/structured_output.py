"""Replies that keep to a JSON schema, a regular expression, a grammar or a list: a mask on the logits at every token.

llguidance reads the grammar as bytes and says which ids may come next. The model's own end of text is not the
grammar's: it is allowed exactly where the text may end. `no_forcing`: where the grammar leaves one text only, the
model still chooses how to cut it into tokens.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from oneblock.errors import OneblockError, missing_extra
from oneblock.infer.stop import DETOKENIZER_CONTEXT
from oneblock.text import Tokenizer
from oneblock.text.stream import TokenBytes

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
# Between the parts of JSON: nothing, a space, or a new line. Without a bound a weak model writes spaces for ever.
BETWEEN = {"x-guidance": {"whitespace_pattern": r" |\n {0,40}"}}
LEXER_STATES = 100_000  # 1-2 kB each; llguidance's own limits of time per token are kept
SHOWN = 60  # characters of what was asked that an error repeats
# Bytes of what is asked. llguidance follows definitions by recursion: more of them than this holds overflow STACK.
LONGEST = {"schema": 1 << 18, "regex": 1 << 16, "grammar": 1 << 16, "choices": 1 << 22}
STACK = 64 << 20  # bytes, of the thread that reads a grammar


class StructuredOutputOptions(TypedDict, total=False):
    """The fields of `Constraint` as keyword arguments; one at most."""

    schema: str | Mapping[str, Any] | bool | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None


@dataclass(frozen=True)
class StructuredOutput:
    """What the whole reply must be: exactly one of these."""

    schema: str | Mapping[str, Any] | bool | None = None  # JSON that keeps to this JSON schema, given whole or as text
    regex: str | None = None  # matched by this, in the syntax of Rust's regex crate: no look-around; \d is 0 to 9
    grammar: str | None = None  # in llguidance's form of Lark, from the rule `start`
    choices: Sequence[str] | None = None  # one of these texts

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise OneblockError(f"give one of schema, regex, grammar and choices, not {' and '.join(given) or 'none'}")
        try:
            size = len(self.lark.encode())
        except UnicodeEncodeError:
            raise self.error("it has half of a surrogate pair, which is no Unicode: remove it") from None
        if size > LONGEST[self.kind]:
            raise self.error(f"it has {size:,} bytes, and at most {LONGEST[self.kind]:,} are read")

    @cached_property
    def kind(self) -> str:
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @cached_property
    def lark(self) -> str:
        """The same as a Lark grammar."""
        if self.choices is not None:
            return f"start: CHOICE\nCHOICE: {' | '.join(map(_quoted, self._texts()))}"
        if self.schema is not None:
            return f"start: %json {self._json()}"
        value = getattr(self, self.kind)
        if not isinstance(value, str):
            raise OneblockError(f"{self.kind} must be a text, not {type(value).__name__}")
        if self.regex is not None:
            return f"start: /{_llguidance().regex_to_lark(self.regex, 'd')}/"
        return value

    def _texts(self) -> Sequence[str]:
        texts = self.choices
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise OneblockError("choices must be a list of texts, at least one, none of them empty")
        return texts

    def _json(self) -> str:
        """The schema with our habit of spaces, unless it names its own."""
        try:
            found = json.loads(self.schema) if isinstance(self.schema, str) else self.schema
            if found is False:
                raise self.error("no text keeps to it")
            if found is not True and not isinstance(found, Mapping):
                raise OneblockError(f"a JSON schema is an object or true, not {json.dumps(found)[:SHOWN]}")
            return json.dumps(BETWEEN | dict({} if found is True else found), ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise OneblockError(f"the schema is no valid JSON: {error}") from None

    def error(self, why: str) -> OneblockError:
        """One line: which of the four, what it began with, what is wrong."""
        text = str(getattr(self, self.kind)) if self.kind != "schema" else self._plain()
        text = text if len(text) <= SHOWN else text[:SHOWN] + ".."
        name = "the choices" if self.kind == "choices" else f"the {self.kind}"
        return OneblockError(f"{name} {text!r}: {_reason(why)}")

    def _plain(self) -> str:
        try:
            return self.schema if isinstance(self.schema, str) else json.dumps(self.schema, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError):
            return "given"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'


def _reason(message: str) -> str:
    """What of llguidance's message a user can mend, on one line."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines() if line.strip()]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    line = (
        line.removesuffix("<non-verbose/>")
        .split("failed to compile JSON schema: ")[-1]
        .split("(in regex): ")[-1]
        .strip()
    )
    if "NoExtension" in line:
        return "no text keeps to it"
    if "too many" in line or "max is" in line or "fuel" in line or "too large" in line:
        return f"it is too complex, make its counts and alternatives fewer ({line})"
    return line


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise missing_extra("structured output", "llguidance", "structured") from None
    return llguidance


# ------------------------------------------------------------------ the vocabulary, as bytes


@dataclass(frozen=True)
class Vocabulary:
    """llguidance's tokenizer for ids 0..size-1; its end of text is one more id, which no model has."""

    tokens: llguidance.LLTokenizer
    size: int
    stripped: tuple[int, ...]  # ids that would lose their space at the start of a text

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        """The same object for the same tokenizer: a large vocabulary takes half a second to sort."""
        known = _known.setdefault(tokenizer, {})
        if size not in known:
            known[size] = cls._made(tokenizer, size)
        return known[size]

    @classmethod
    def _made(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        pieces = TokenBytes(tokenizer.backend)
        how = pieces.spelling
        if how is None or how.suffix:
            raise OneblockError("the tokenizer does not spell token by token: replies cannot be held to a form with it")
        control = set(tokenizer.special.values())
        stripped = (id for id in range(size) if how.strip and pieces.strip_leading(id, how.strip)[0] != pieces[id])
        spelt = _Spelt([pieces[id] for id in range(size)], sorted(id for id in control if id < size), tokenizer.backend)
        ll = _llguidance()
        tokens = ll.LLTokenizer(ll.TokenizerWrapper(spelt), n_vocab=size + 1, eos_token=size)
        return cls(tokens, size, tuple(stripped))


_known: WeakKeyDictionary[Tokenizer, dict[int, Vocabulary]] = WeakKeyDictionary()


class _Spelt:
    """The tokenizer in the form that llguidance reads."""

    def __init__(self, tokens: list[bytes], control: list[int], backend: Any):
        self.tokens, self.special_token_ids = [*tokens, b"<end of text>"], [*control, len(tokens)]
        self.eos_token_id, self.bos_token_id, self._backend = len(tokens), None, backend

    def __call__(self, text: bytes | str) -> list[int]:
        """Called only for text that is forced, which `no_forcing` leaves out."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._backend.encode(text, add_special_tokens=False).ids


def _deep(work: Callable[[], T]) -> T:
    """The result of `work`, done where the stack is STACK bytes."""
    with _stack, ThreadPoolExecutor(1) as pool:
        before = threading.stack_size(STACK)
        try:
            done = pool.submit(work)
        finally:
            threading.stack_size(before)
        return done.result()


_stack = threading.Lock()  # the size is the process's


# ------------------------------------------------------------------ one reply, and a batch of them


class CompiledGrammar:
    """A constraint read for a vocabulary, and found to have at least a first token."""

    def __init__(self, constraint: StructuredOutput, tokenizer: Tokenizer, vocab: int):
        self.constraint, self.tokenizer = constraint, tokenizer
        self.vocabulary = Vocabulary.of(tokenizer, vocab)
        self._fresh = _deep(self._read)
        self.matcher().allowed()

    def _read(self) -> llguidance.LLMatcher:
        ll = _llguidance()
        limits = ll.LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
        found = ll.LLMatcher(self.vocabulary.tokens, self.constraint.lark + NO_FORCING, log_level=0, limits=limits)
        found.compute_bitmask()
        found.reset()
        return found

    def matcher(self, prompt: Sequence[int] | None = None) -> GrammarMatcher:
        """At the start of a reply. `prompt`: what stands before; where it shows nothing, a first space is lost."""
        loses = prompt is not None and self.vocabulary.stripped and not self._shows(prompt)
        return GrammarMatcher(self, self._fresh.deep_copy(), self.vocabulary.stripped if loses else ())

    def _shows(self, prompt: Sequence[int]) -> bool:
        return self.tokenizer.decode(prompt[-DETOKENIZER_CONTEXT:]) != ""

    def start(self, texts: Sequence[Sequence[int]], stop_ids: frozenset[int]) -> GrammarMatchers:
        """A matcher for the reply to each text."""
        return GrammarMatchers(
            [self.matcher(text) for text in texts], sorted(i for i in stop_ids if i < self.vocabulary.size)
        )


class GrammarMatcher:
    """How far one reply has come in the grammar."""

    def __init__(self, grammar: CompiledGrammar, state: llguidance.LLMatcher, first: Sequence[int]):
        self.grammar, self._state, self._not_first = grammar, state, list(first)
        self._check()

    def allowed(self) -> Tensor:
        """Which ids may come next, (V,) of bool; the ends of text are for the caller to add where it `may_end`."""
        bits = torch.frombuffer(bytearray(self._state.compute_bitmask()), dtype=torch.uint8)
        self._check()
        found = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()
        found = found[: self.grammar.vocabulary.size]
        found[self._not_first] = False
        return found

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with what the grammar does not allow at -inf."""
        return logits.masked_fill(~self.allowed().to(logits.device), -torch.inf)

    def push(self, id: int) -> None:
        """One more token of the reply, of those that were allowed."""
        self._not_first = []
        self._state.consume_token(id)
        self._check()

    @property
    def may_end(self) -> bool:
        return self._state.is_accepting()

    @property
    def must_end(self) -> bool:
        """Nothing can follow."""
        return self._state.is_stopped()

    def _check(self) -> None:
        if self._state.is_error():
            raise self.grammar.constraint.error(self._state.get_error())


class GrammarMatchers:
    """The matchers of a batch."""

    def __init__(self, rows: list[GrammarMatcher], stop_ids: list[int]):
        self.rows, self.stop_ids = rows, stop_ids

    def allowed(self) -> Tensor:
        """Which ids may come next in each row, (B, V) of bool, with the ends of text where one may end."""
        found = torch.stack([row.allowed() for row in self.rows])
        if self.stop_ids:
            found[:, self.stop_ids] = torch.tensor([row.may_end for row in self.rows])[:, None]
        return found

    def push(self, ids: Sequence[int]) -> list[bool]:
        """One more token of each row; whether nothing can follow it."""
        for row, id in zip(self.rows, ids, strict=True):
            if id not in self.stop_ids:
                row.push(id)
        return [row.must_end for row in self.rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.rows = [self.rows[i] for i in rows]
