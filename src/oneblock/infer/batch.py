"""Many prompts, a few at a time: a file of them in, a file of replies out, whole again after a kill.

Rows share their columns in the cache, so a new prompt cannot simply take the place of one that has ended. When half
of a batch has ended, those that go on are read again together with prompts that waited: one pass for many replies.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from oneblock.config import nearest
from oneblock.errors import OneblockError
from oneblock.files import report_write_errors
from oneblock.infer.cache import item_bytes
from oneblock.infer.generate import Request, Sequences, check, remaining_tokens
from oneblock.infer.llm import LLM, OPTIONS
from oneblock.infer.sample import Sampler
from oneblock.infer.stop import Reply
from oneblock.infer.structured_output import StructuredOutputOptions
from oneblock.plan.cache import kv_bytes

KEYS = {"prompt", "messages", "id"} | OPTIONS - {"top_logprobs"}  # of a line
MOST = {"cpu": 32, "cuda": 128}  # rows of a batch, where memory does not say less
SHARE = 0.5  # of the free memory

Id = str | int


@dataclass(frozen=True)
class Job:
    """One line of the input, checked."""

    line: int  # from 1
    id: Id
    prompt: list[int]
    request: Request


@dataclass(frozen=True)
class Result:
    """One line of the output."""

    id: Id
    text: str | None
    ids: list[int]
    finish_reason: str  # stop, length, or error
    prompt_tokens: int
    error: str | None = None  # why the reply could not go on, where it ended so

    def json(self) -> str:
        row = {name: value for name, value in vars(self).items() if name != "error" or value is not None}
        return json.dumps(row, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------ the batch


class Row:
    """One reply while it grows, with its own generator and limits: what it says does not depend on the batch."""

    def __init__(self, llm: LLM, job: Job):
        request, model = job.request, llm.model
        self.job, self.text, self.error, self._tokenizer = job, "", None, llm.tokenizer
        limit = remaining_tokens(model.spec, job.prompt, request.max_tokens)
        self.reply = Reply(llm.detokenizer(job.prompt), limit, request.stop_ids, request.stop)
        self._limit = limit
        seeds = request.seeds or (secrets.randbits(63),)
        self._sampler = Sampler(request.sampling, seeds, [job.prompt], model.spec.vocab, model.device)
        grammar = request.grammar
        self._matchers = grammar.start([job.prompt], request.stop_ids) if grammar is not None else None

    @property
    def ids(self) -> list[int]:
        return self.job.prompt + self.reply.ids

    @property
    def remaining_tokens(self) -> int:
        """How many tokens may still come."""
        return self._limit - len(self.reply.ids)

    @property
    def done(self) -> bool:
        return self.error is not None or self.reply.finish is not None

    def sample_tokens(self, logits: Tensor) -> int:
        """The next token, from logits (1, V). A reply that cannot go on has an `error`, and any id."""
        try:
            allowed = self._matchers.allowed() if self._matchers is not None else None
            id = int(self._sampler.next(logits, allowed))
            last = self._matchers is not None and self._matchers.push([id])[0]
        except OneblockError as error:
            self.error = str(error)
            return 0
        self.text += self.reply.push(id, last)
        return id

    def result(self) -> Result:
        finish = "error" if self.error is not None else str(self.reply.finish)
        text = None if self._tokenizer is None else self.text
        return Result(self.job.id, text, self.reply.ids, finish, len(self.job.prompt), self.error)


@torch.inference_mode()
def replies(llm: LLM, jobs: Iterable[Job], size: int) -> Iterator[Result]:
    """The replies as they end, at most `size` prompts at once, those of similar length together, longest first."""
    waiting = deque(sorted(jobs, key=lambda job: -len(job.prompt)))
    steps = sum(remaining_tokens(llm.spec, job.prompt, job.request.max_tokens) for job in waiting) // size
    compiled = llm.ready(steps)
    rows: list[Row] = []
    texts: Sequences | None = None
    while waiting or rows:
        if texts is None or (waiting and len(rows) <= size // 2):
            rows += [Row(llm, waiting.popleft()) for _ in range(min(size - len(rows), len(waiting)))]
            found = [row.ids for row in rows]
            most = max(map(len, found)) + max(row.remaining_tokens for row in rows)
            texts = Sequences(llm.model, found, most, compiled, llm.kv_cache_dtype == "int8")
        logits = texts.step()
        if logits.amax().isnan():
            raise OneblockError("the model's logits are not numbers: load it with dtype bfloat16 or float32")
        texts.append_tokens([row.sample_tokens(logits[i : i + 1]) for i, row in enumerate(rows)])
        going = [i for i, row in enumerate(rows) if not row.done]
        yield from (row.result() for row in rows if row.done)
        if 0 < len(going) < len(rows):
            texts.select_sequences(going)
        rows = [rows[i] for i in going]


def rows_that_fit(llm: LLM, jobs: Sequence[Job]) -> int:
    """How many rows half of the free memory holds: keys and values at their longest, logits, the first pass."""
    model, spec = llm.model, llm.spec
    prompt = max((len(job.prompt) for job in jobs), default=1)
    length = max(
        (len(job.prompt) + remaining_tokens(spec, job.prompt, job.request.max_tokens) for job in jobs), default=1
    )
    keys = kv_bytes(spec, length, item_bytes(spec, model.dtype, llm.kv_cache_dtype == "int8"))
    row = 2 * keys + 16 * spec.vocab + 64 * prompt * spec.dim  # twice: rows that leave are left out by a copy
    return max(1, min(MOST.get(model.device.type, 32), int(SHARE * free_memory(model.device) / row)))


def free_memory(device: torch.device) -> int:
    """Bytes, of the GPU or of the system."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# ------------------------------------------------------------------ the input


class Reader:
    """Lines to jobs. `defaults`: the options of lines that do not have their own; line n draws from seed + n - 1."""

    def __init__(self, llm: LLM, defaults: Mapping[str, Any]):
        self.llm, self.defaults = llm, {name: value for name, value in defaults.items() if value is not None}
        self._grammars: dict[str, Any] = {}

    def read(self, path: Path) -> list[Job]:
        """Every line, checked before anything runs; OneblockError with the number of the first that is wrong."""
        jobs: dict[Id, Job] = {}
        for n, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                job = self.job(n, json.loads(line))
                if job.id in jobs:
                    raise OneblockError(f"id {job.id!r} is that of line {jobs[job.id].line} already")
            except (OneblockError, ValueError, TypeError, RecursionError) as error:
                raise OneblockError(f"{path}, line {n}: {error}") from None
            jobs[job.id] = job
        if not jobs:
            raise OneblockError(f"{path} has no prompts")
        return list(jobs.values())

    def job(self, n: int, row: Any) -> Job:
        if not isinstance(row, dict):
            raise OneblockError('a line is an object such as {"prompt": "Once upon a time"}')
        unknown = next((name for name in row if name not in KEYS), None)
        if unknown is not None:
            raise OneblockError(f"unknown key {unknown!r}{nearest(unknown, KEYS)}")
        id = row.get("id", n)
        if isinstance(id, bool) or not isinstance(id, str | int):
            raise OneblockError(f"id is {json.dumps(id)}: it must be a text or a whole number")
        prompt = self._prompt(row)
        own = {name: value for name, value in row.items() if name in OPTIONS and value is not None}
        seeded = {"seed": self.defaults["seed"] + n - 1} if "seed" in self.defaults else {}
        request = self._request(self._defaults(own) | seeded | _checked(own))
        check(self.llm.spec, [prompt], request)
        return Job(n, id, prompt, request)

    def _defaults(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """A line that says what its reply must be takes the place of what all must be."""
        shaped = any(name in own for name in StructuredOutputOptions.__annotations__)
        return {k: v for k, v in self.defaults.items() if not (shaped and k in StructuredOutputOptions.__annotations__)}

    def _prompt(self, row: dict[str, Any]) -> list[int]:
        if ("prompt" in row) == ("messages" in row):
            raise OneblockError('give either "prompt" or "messages"')
        tokenizer, said = self.llm.tokenizer, row.get("messages")
        if "messages" in row:
            if not isinstance(said, list) or not said or not all(isinstance(m, dict) for m in said):
                raise OneblockError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
            if tokenizer is None:
                raise OneblockError("messages need a tokenizer, which the model's folder lacks")
            return tokenizer.chat(said)
        if not isinstance(row["prompt"], str | list):
            raise OneblockError("prompt must be a text or a list of ids")
        return self.llm.encode(row["prompt"])

    def _request(self, options: dict[str, Any]) -> Request:
        """Grammars are read once for all lines that ask the same."""
        shape = {name: options.pop(name) for name in StructuredOutputOptions.__annotations__ if name in options}
        key = json.dumps(shape)
        if key not in self._grammars:
            self._grammars[key] = self.llm.request(**shape).grammar
        return replace(self.llm.request(**options), grammar=self._grammars[key])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise OneblockError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OneblockError(f"{path} is no UTF-8 text (byte {error.start})") from None


def _checked(own: dict[str, Any]) -> dict[str, Any]:
    """What JSON cannot say of an option, or says otherwise than Python."""
    for name in ("max_tokens", "seed"):
        if not isinstance(own.get(name, 1), int) or isinstance(own.get(name), bool):
            raise OneblockError(f"{name} is {json.dumps(own[name])}: it must be a whole number")
    stop, ids, bias = own.get("stop", []), own.get("stop_ids", []), own.get("logit_bias", {})
    if not isinstance(stop, str | list) or not all(isinstance(text, str) for text in stop):
        raise OneblockError("stop must be a text or a list of texts")
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise OneblockError("stop_ids must be a list of ids")
    if not isinstance(bias, dict):
        raise OneblockError('logit_bias must be an object such as {"50256": -100}')
    return own | ({"logit_bias": {int(id): float(x) for id, x in bias.items()}} if bias else {})


# ------------------------------------------------------------------ the output

RERUN = "free disk space and run the same command again: finished replies are kept"


class Output:
    """The file of replies. What a killed run has left of a last line is dropped; whole lines are kept."""

    def __init__(self, path: Path, known: set[Id]):
        self.path, self.done = path, set[Id]()
        try:
            self._file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise OneblockError(f"{path}: {error.strerror}") from None
        try:
            _lock(self._file)
            self._file.truncate(self._read(known))
        except BlockingIOError:
            self._file.close()
            raise OneblockError(f"{path}: another run is writing it") from None
        except OneblockError:
            self._file.close()
            raise

    def _read(self, known: set[Id]) -> int:
        """Who is done; the bytes of the whole lines."""
        self._file.seek(0)
        whole = 0
        for n, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            self.done.add(self._id(n, line, known))
            whole += len(line)
        return whole

    def _id(self, n: int, line: bytes, known: set[Id]) -> Id:
        try:
            row = json.loads(line)
            id, _ = row["id"], row["finish_reason"]
        except (ValueError, TypeError, KeyError):
            raise OneblockError(f"{self.path}, line {n} is no reply: give another --output") from None
        if id not in known:
            raise OneblockError(f"{self.path}, line {n}: the input has no prompt {id!r}: give another --output")
        return id

    def write(self, result: Result) -> None:
        """One whole line, out of this process when it returns."""
        with report_write_errors(self.path, RERUN):
            self._file.write(result.json().encode())
            self._file.flush()
        self.done.add(result.id)

    def close(self) -> None:
        """Flush to the disk and close."""
        with report_write_errors(self.path, RERUN):
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()


def _lock(file: IO[bytes]) -> None:
    """BlockingIOError where another process has the file; where the system has no locks, nothing."""
    with suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def run(llm: LLM, jobs: Sequence[Job], output: Output, size: int | None, report: Callable[[Result], None]) -> None:
    """Reply to the jobs that the output does not have. Whatever ends it, finished replies stay."""
    waiting = [job for job in jobs if job.id not in output.done]
    try:
        for result in replies(llm, waiting, size or rows_that_fit(llm, waiting)):
            output.write(result)
            report(result)
    finally:
        output.close()


def complete_file(llm: LLM, source: Path, target: Path, size: int | None, defaults: Mapping[str, Any]) -> None:
    """`oneblock generate MODEL --input SOURCE --output TARGET`, with a live line in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if size is not None and size < 1:
        raise OneblockError(f"batch size is {size}: it must be at least 1")
    if source.resolve() == target.resolve():
        raise OneblockError(f"{target} is the input: give another --output")
    jobs = Reader(llm, defaults).read(source)
    output = Output(target, {job.id for job in jobs})
    before, errors, tokens = len(output.done), 0, 0
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=len(jobs), completed=before)

            def report(result: Result) -> None:
                nonlocal errors, tokens
                errors, tokens = errors + (result.error is not None), tokens + len(result.ids)
                rate = tokens / max(bar.tasks[0].elapsed or 0.0, 1e-9)
                bar.update(task, advance=1, description=f"{rate:,.0f} tokens/s")

            run(llm, jobs, output, size, report)
    finally:
        note = f"{len(output.done)} of {len(jobs)} prompts done, {before} of them before; {tokens:,} tokens"
        print(note + (f"; {errors} could not go on, see their lines" if errors else ""), file=sys.stderr)
