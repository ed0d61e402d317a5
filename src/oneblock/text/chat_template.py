"""Chat templates are rendered in a child process, which is killed when a template runs too long.

A template is a program that came with a checkpoint. jinja2's sandbox keeps it from files and from Python's internals,
but not from endless loops and huge strings inside C calls; a separate process with limits does.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from oneblock.errors import OneblockError

SECONDS = 2.0  # wall-clock limit of one request
START_SECONDS = 60.0  # limit for starting the child, which may be slow on a loaded machine
MAX_REPLY = 256 << 20  # bytes
# The child gets this process's import path, but none of its modules: the worker's file is run as a script.
BOOTSTRAP = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateRenderer:
    """The parent's side of the child process: started on first use, reused, restarted after a kill or a fork."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._detach)

    def render(self, template: str, values: Sequence[Mapping[str, Any]]) -> list[str | OneblockError]:
        """Render the template once for each set of values. An item that fails is an OneblockError, not raised."""
        try:
            request = json.dumps({"template": template, "values": values}).encode() + b"\n"
        except (ValueError, TypeError, RecursionError) as error:
            raise template_error(f"its values are not JSON ({error})") from None
        with self._lock:
            reply = self._exchange(request)
        return [result["text"] if "text" in result else template_error(result["error"]) for result in json.loads(reply)]

    def _exchange(self, request: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._connection.sendall(request)
            reply = self._replies.readline(MAX_REPLY)
        except BaseException as error:  # also KeyboardInterrupt: the next request must not read this one's reply
            self.stop()
            if isinstance(error, TimeoutError):
                raise template_error(f"it ran for over {SECONDS:g} seconds") from None
            if isinstance(error, OSError):
                raise template_error(f"the rendering process ended ({error})") from None
            raise
        if not reply.endswith(b"\n"):
            self.stop()
            raise template_error("the rendering process ended")
        return reply

    def _start(self) -> None:
        self.stop()
        self._connection, remote = socket.socketpair()
        self._replies = self._connection.makefile("rb")
        argv = [sys.executable, "-I", "-c", BOOTSTRAP, str(WORKER), *filter(None, sys.path)]
        with remote:
            null = subprocess.DEVNULL
            self._process = subprocess.Popen(argv, stdin=remote.fileno(), stdout=null, stderr=null)
        self._connection.settimeout(START_SECONDS)
        try:
            started = self._replies.readline() == b"ready\n"
        except OSError:
            started = False
        if not started:
            self.stop()
            raise OneblockError(f"the process that renders chat templates does not start: check {sys.executable}")
        self._connection.settimeout(SECONDS)

    def stop(self) -> None:
        """End the child process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._close()

    def _detach(self) -> None:
        """After a fork, leave the child process to the parent."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
            self._close()

    def _close(self) -> None:
        self._process = None
        self._replies.close()
        self._connection.close()


@cache
def renderer() -> TemplateRenderer:
    """The renderer of this process."""
    return TemplateRenderer()


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text of a chat template for JSON-like values. OneblockError where the template fails or hits a limit."""
    [text] = renderer().render(template, [values])
    if isinstance(text, OneblockError):
        raise text
    return text


def template_error(reason: str) -> OneblockError:
    return OneblockError(f"the chat template cannot render this conversation: {reason}")
