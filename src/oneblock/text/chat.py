"""Chat templates, which are programs that come with a checkpoint: run in a sandbox, under a limit of time and size."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from oneblock.errors import OneblockError

GUARD = "\ue0fe"  # a private character inside guarded names; chat templates and people do not use it
SECONDS = 5.0
LETTERS = 4_000_000  # of output


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which no text or list grows past the limit of the output by a multiplication."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for many, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(many, "__len__") and isinstance(times, int) and len(many) * times > LETTERS:
                raise jinja2.TemplateRuntimeError("a multiplication makes too long a text")
        if operator == "**":
            raise jinja2.TemplateRuntimeError("powers are not allowed")
        return super().call_binop(context, operator, left, right)


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text of a template. What it may do, and its helpers, are those Hugging Face gives."""
    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return _limited(env.from_string(template), values)
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as e:
        reason = " ".join(str(e).split())[:200]
        raise OneblockError(f"the chat template refuses this conversation: {reason}") from None


def _limited(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Render while a clock and a scale look on: a tracer sees every line that the template runs."""
    end, pieces, size = time.monotonic() + SECONDS, [], 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise jinja2.TemplateRuntimeError(f"it ran for over {SECONDS:g} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for piece in template.generate(**values):
            size += len(piece)
            if size > LETTERS:
                raise jinja2.TemplateRuntimeError(f"its text is over {LETTERS:,} letters")
            pieces.append(piece)
    finally:
        sys.settrace(before)
    return "".join(pieces)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is, not escaped for HTML as jinja2's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def guard(value: Any, names: Mapping[str, int]) -> Any:
    """The value with every control token that its texts spell broken up by a mark."""
    if isinstance(value, str):
        for name in names:
            if name in value:
                value = value.replace(name, name[:1] + GUARD + name[1:])
        return value
    if isinstance(value, Mapping):
        return {guard(key, names): guard(x, names) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [guard(x, names) for x in value]
    return value


def unguard(text: str) -> str:
    return text.replace(GUARD, "")
