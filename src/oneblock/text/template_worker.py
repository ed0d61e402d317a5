"""The child process that renders chat templates: jinja2's immutable sandbox under memory, CPU and size limits.

`chat_template.TemplateRenderer` runs this file as a script; it imports only jinja2 and the standard library. One JSON
object per line on file descriptor 0, a socket:
{"template": SOURCE, "values": [{..}, ..]} -> [{"text": ..} or {"error": ..}, ..], one for each set of values.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import socket
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 << 20  # bytes of address space
CPU_SECONDS = 10  # per request, in case the parent is gone; the parent's own limit is shorter
MAX_LENGTH = 16_000_000  # characters of a rendered conversation


class Generation(Extension):
    """`{% generation %}..{% endgeneration %}`, with which templates mark assistant tokens; rendered as its content."""

    tags = frozenset(("generation",))  # pyright: ignore[reportAssignmentType]: jinja2 only looks names up in it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(date_format: str) -> str:
    return datetime.datetime.now().strftime(date_format)


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """The template with the extensions, filters and functions that transformers provides."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson
    return environment.from_string(source)


def render(source: str, values: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = compile_template(source).render(values)
    except MemoryError:
        return {"error": f"it needs over {MEMORY >> 20} MB of memory"}
    except Exception as error:  # anything that a template may raise, SyntaxError and RecursionError included
        return {"error": " ".join(str(error).split())[:200] or type(error).__name__}
    if len(text) > MAX_LENGTH:
        return {"error": f"it writes {len(text):,} characters, over the limit of {MAX_LENGTH:,}"}
    return {"text": text}


def limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    limit(resource.RLIMIT_AS, MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as requests:
        connection.sendall(b"ready\n")
        for line in requests:
            limit(resource.RLIMIT_CPU, int(time.process_time()) + CPU_SECONDS)
            request = json.loads(line)
            results = [render(request["template"], values) for values in request["values"]]
            connection.sendall(json.dumps(results).encode() + b"\n")


if __name__ == "__main__":
    main()
