"""Where chat templates run: jinja2's immutable sandbox, with an end to time and size.

A template is a program that came with a checkpoint. jinja2 keeps it from files and from Python's inside, but not from
running for ever or from writing more than the memory holds; both are refused here, before they happen.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, wraps
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import filters as own_filters
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from oneblock.errors import OneblockError

SECONDS = 5.0
LETTERS = 4_000_000  # of any one text, and parts of any one list
WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes", "format_map")  # methods
# A format with a huge width, or with one that is an argument: `%99999d`, `%*d`, `{:99999}`, `{:{}}`.
WIDE = re.compile(r"%[^%A-Za-z]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\d{5}|\{)")
COMPARING = ("sort", "unique", "min", "max", "groupby", "dictsort", "sum")  # filters
COMPARISONS = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "==",
    "!=",
    "<",
    "<=",
    ">",
    ">=",
    "equalto",
    "lessthan",
    "greaterthan",
)
MENDABLE = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class Generation(Extension):
    """`{% generation %}..{% endgeneration %}`, with which templates mark what the model itself says."""

    tags = frozenset(("generation",))  # pyright: ignore[reportAssignmentType]: jinja2 only looks names up in it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Watch(NodeTransformer):
    """`a ~ b` and `a == b`, which the sandbox does not watch, as calls that it does."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("glue", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        for one in (node, *node.ops):
            one.expr = one.expr if isinstance(one.expr, nodes.Const) else _call("weigh", one.expr)
        return node


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None, lineno=args[0].lineno)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which no text or list outgrows the limit."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        extensions = [Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=bounded)
        self.concat = joined
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        del self.globals["lipsum"]
        for name in ("center", "wordwrap", "xmlattr", "urlize", "batch", "slice"):
            del self.filters[name]
        self.filters |= {"tojson": tojson, "string": text_of, "indent": indented}
        self.filters |= {"replace": _replaced(self.filters["replace"]), "join": _joined(self.filters["join"])}
        self.filters["format"] = _formatted(self.filters["format"])
        for table, names in ((self.filters, COMPARING), (self.tests, (*COMPARISONS, "in"))):
            table |= {name: _weighed(table[name]) for name in names}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return Watch().visit(super()._parse(source, name, filename))

    def glue(self, *parts: Any) -> str:
        return joined(map(text_of, parts))

    def weigh(self, value: Any) -> Any:
        return bounded(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "*":
                bound(_times(left, right))
            case "+":
                bound(_length(left) + _length(right))
            case "%" if isinstance(left, str):
                _check_format(left)
            case "**":
                raise jinja2.TemplateRuntimeError("powers are not allowed")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in WIDENING and super().is_safe_attribute(obj, attr, value)

    def call(self, *given: Any, **kwargs: Any) -> Any:  # a template may well name an argument `obj`
        context, obj, *args = given
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            match getattr(obj, "__name__", ""):
                case "replace":
                    _check_replace(owner, *args[:2])
                case "join":
                    args = [_check_join(owner, items) for items in args]
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text of a template. What it may do, and its helpers, are those Hugging Face gives."""
    try:
        return _watched(_compiled(template), values)
    except (*MENDABLE, RecursionError, MemoryError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise OneblockError(f"the chat template refuses this conversation: {reason}") from None


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return Environment().from_string(template)


def _watched(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Render while a clock looks on: a tracer sees every line that the template runs."""
    end = time.monotonic() + SECONDS

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise jinja2.TemplateRuntimeError(f"it ran for over {SECONDS:g} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return joined(template.generate(**values))
    finally:
        sys.settrace(before)


# ------------------------------------------------------------------ helpers of templates


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    _check_format(form)
    return datetime.datetime.now().strftime(form)


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is, not escaped for HTML as jinja2's own filter does."""
    if isinstance(indent, int):
        bound(indent * 1000)
    return json.dumps(bounded(value), ensure_ascii=ensure_ascii, indent=indent, **options)


def indented(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    bound((str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return own_filters.do_indent(text, width, first, blank)


def _replaced(own: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def replace(context: Any, text: Any, old: str, new: str, *count: Any) -> Any:
        _check_replace(text_of(text), old, new)
        return own(context, text_of(text), old, new, *count)

    return replace


def _joined(own: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def join(context: Any, items: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        items = [bounded(item) for item in items]
        return own(context, items if attribute is not None else _check_join(d, map(text_of, items)), d, attribute)

    return join


def _formatted(own: Callable[..., Any]) -> Callable[..., Any]:
    def form(text: str, *args: Any, **kwargs: Any) -> Any:
        _check_format(text)
        return own(text, *args, **kwargs)

    return form


def _weighed(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def weighed(*args: Any, **kwargs: Any) -> Any:
        return own(*map(bounded, args), **kwargs)

    return weighed


# ------------------------------------------------------------------ the scale


def bound(size: int) -> None:
    if size > LETTERS:
        raise jinja2.TemplateRuntimeError(f"it makes a text or list of over {LETTERS:,} parts")


def bounded(value: Any) -> Any:
    """The value, if its text is within the limit: lists that hold one list many times are small, their text is not."""
    if isinstance(value, (list, tuple, dict)):
        size, todo = 0, [value]
        while todo:
            one = todo.pop()
            size += _length(one) + 1
            bound(size)
            if isinstance(one, dict):
                todo += [*one, *one.values()]
            elif isinstance(one, (list, tuple)):
                todo += one
    return value


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else str(bounded(value))


def joined(pieces: Iterable[str]) -> str:
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        bound(size)
        found.append(piece)
    return "".join(found)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, range)) else 1


def _times(left: Any, right: Any) -> int:
    many, times = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(many, int) and isinstance(times, int):
        return (many.bit_length() + times.bit_length()) * 1000  # of numbers: a few thousand digits at most
    return _length(many) * times if isinstance(times, int) else 0


def _check_replace(text: Any, old: Any = "", new: Any = "") -> None:
    if isinstance(text, type(old)) and isinstance(new, type(old)):
        bound(len(text) + text.count(old) * len(new))


def _check_join(glue: Any, items: Iterable[Any]) -> list[Any]:
    found = list(items)
    bound(sum(map(_length, found)) + _length(glue) * len(found))
    return found


def _check_format(text: Any) -> None:
    if WIDE.search(str(text).replace("{{", "").replace("}}", "")):
        raise jinja2.TemplateRuntimeError("a format of such a width is not allowed")
