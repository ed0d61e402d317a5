"""Batch inference: a JSONL file of prompts in, a JSONL file of replies out, resumable after a kill.

Rows of a batch share the columns of one KV cache, so a new prompt cannot take the row of a finished one. Once half of a
batch has finished, the others are prefilled again together with waiting prompts.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from oneblock.config import check_range, nearest
from oneblock.errors import OneblockError
from oneblock.files import read_text, report_write_errors
from oneblock.infer.cache import bytes_per_element
from oneblock.infer.generate import Request, Sequences, allowed_tokens, check_logits, check_request, remaining_tokens
from oneblock.infer.llm import LLM
from oneblock.infer.options import BATCH_SIZE, OPTIONS, StructuredOutputOptions
from oneblock.infer.sample import Sampler
from oneblock.kernels.huge_pages import free_memory
from oneblock.plan.cache import kv_bytes

KEYS = {"prompt", "messages", "id"} | OPTIONS - {"top_logprobs"}  # of an input line
MAX_BATCH_SIZE = {"cpu": 32, "cuda": 128}  # where memory allows it
MEMORY_SHARE = 0.5  # of the free memory

Id = str | int


@dataclass(frozen=True)
class Job:
    """One line of the input: a request, or the error that keeps it from running."""

    line: int  # from 1
    id: Id
    prompt: list[int] = field(default_factory=list)
    request: Request = field(default_factory=Request)
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """One line of the output."""

    id: Id
    text: str | None
    ids: list[int]
    finish_reason: str  # stop, length, or error
    prompt_tokens: int
    error: str | None = None  # why the request could not run, or not to its end

    def to_json(self) -> bytes:
        row = {name: value for name, value in vars(self).items() if name != "error" or value is not None}
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")  # a lone surrogate


# ------------------------------------------------------------------ the batch


class Row:
    """One sequence of the batch, with its own sampler and limits: its reply does not depend on the batch."""

    def __init__(self, llm: LLM, job: Job):
        self.job, self.text, self.error, self._tokenizer = job, "", job.error, llm.tokenizer
        self.reply, request = llm.start_reply(job.prompt, job.request), job.request
        self._sampler = Sampler(request.sampling, request.seeds, [job.prompt], llm.spec.vocab, llm.model.device)

    @property
    def ids(self) -> list[int]:
        return self.job.prompt + self.reply.ids

    @property
    def is_finished(self) -> bool:
        return self.error is not None or self.reply.finish_reason is not None

    def sample_token(self, logits: Tensor) -> int:
        """The next token from logits (1, V). Where there is none, `error` is set and the id has no meaning."""
        try:
            id = int(self._sampler.next(check_logits(logits), allowed_tokens([self.reply])))
            self.text += self.reply.push(id)
        except OneblockError as error:
            self.error = str(error)
            return 0
        return id

    def build_result(self) -> Result:
        finish_reason = "error" if self.error is not None else str(self.reply.finish_reason)
        text = None if self._tokenizer is None else self.text
        return Result(self.job.id, text, self.reply.ids, finish_reason, len(self.job.prompt), self.error)


@torch.inference_mode()
def generate_results(llm: LLM, jobs: Iterable[Job], batch_size: int) -> Iterator[Result]:
    """Results in the order in which they finish; prompts of similar length run together, the longest first."""
    jobs = list(jobs)
    yield from (Result(job.id, None, [], "error", 0, job.error) for job in jobs if job.error is not None)
    waiting = deque(sorted((job for job in jobs if job.error is None), key=lambda job: -len(job.prompt)))
    steps = sum(remaining_tokens(llm.spec, job.prompt, job.request.max_tokens) for job in waiting) // batch_size
    compiled = llm.prepare_decoding(steps)
    rows: list[Row] = []
    sequences: Sequences | None = None
    while waiting or rows:
        if sequences is None or (waiting and len(rows) <= batch_size // 2):
            rows += [Row(llm, waiting.popleft()) for _ in range(min(batch_size - len(rows), len(waiting)))]
            ids = [row.ids for row in rows]
            capacity = max(map(len, ids)) + max(row.reply.remaining_tokens for row in rows)
            sequences = Sequences(llm.model, ids, capacity, compiled, llm.kv_cache_dtype == "int8")
        logits = sequences.step()
        sequences.append_tokens([row.sample_token(logits[i : i + 1]) for i, row in enumerate(rows)])
        active = [i for i, row in enumerate(rows) if not row.is_finished]
        yield from (row.build_result() for row in rows if row.is_finished)
        if 0 < len(active) < len(rows):
            sequences.select_sequences(active)
        rows = [rows[i] for i in active]


def choose_batch_size(llm: LLM, jobs: Sequence[Job]) -> int:
    """The rows that half of the free memory holds: KV cache at its longest, logits, activations of the prefill."""
    model, spec = llm.model, llm.spec
    jobs = [job for job in jobs if job.error is None]
    prompt = max((len(job.prompt) for job in jobs), default=1)
    limits = (len(job.prompt) + remaining_tokens(spec, job.prompt, job.request.max_tokens) for job in jobs)
    cache = kv_bytes(spec, max(limits, default=1), bytes_per_element(spec, model.dtype, llm.kv_cache_dtype == "int8"))
    row = 2 * cache + 16 * spec.vocab + 64 * prompt * spec.dim  # twice: dropping finished rows copies the cache
    return max(1, min(MAX_BATCH_SIZE.get(model.device.type, 32), int(MEMORY_SHARE * free_memory(model.device) / row)))


# ------------------------------------------------------------------ the input


class Reader:
    """Parses input lines to jobs. `defaults`: options that a line may override; line n uses seed + n - 1."""

    def __init__(self, llm: LLM, defaults: Mapping[str, Any]):
        self.llm, self.defaults = llm, {name: value for name, value in defaults.items() if value is not None}
        self._grammars: dict[str, Any] = {}
        self._build_request(dict(self.defaults))  # bad defaults are refused here, not in every line

    def read(self, path: Path) -> list[Job]:
        """Parse every line into a job; OneblockError names the first line that is malformed."""
        jobs: dict[Id, Job] = {}
        for n, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                job = self.parse_job(n, json.loads(line))
                if job.id in jobs:
                    raise OneblockError(f"id {job.id!r} is already the id of line {jobs[job.id].line}")
            except (OneblockError, ValueError, RecursionError) as error:
                raise OneblockError(f"{path}, line {n}: {error}") from None
            jobs[job.id] = job
        if not jobs:
            raise OneblockError(f"{path} has no prompts")
        return list(jobs.values())

    def parse_job(self, n: int, row: Any) -> Job:
        """The job of line n; a request that cannot run is a job with an error."""
        if not isinstance(row, dict):
            raise OneblockError('a line must be an object such as {"prompt": "Once upon a time"}')
        unknown = next((name for name in row if name not in KEYS), None)
        if unknown is not None:
            raise OneblockError(f"unknown key {unknown!r}{nearest(unknown, KEYS)}")
        id = row.get("id", n)
        if isinstance(id, bool) or not isinstance(id, str | int):
            raise OneblockError(f"id is {json.dumps(id)}, but it must be a string or an integer")
        try:
            prompt = self._encode_prompt(row)
            request = self._build_request(self._merge_options(n, row))
            check_request(self.llm.spec, [prompt], request)
        except (OneblockError, ValueError, TypeError, RecursionError) as error:
            return Job(n, id, error=str(error))
        return Job(n, id, prompt, request)

    def _encode_prompt(self, row: dict[str, Any]) -> list[int]:
        if ("prompt" in row) == ("messages" in row):
            raise OneblockError('give either "prompt" or "messages"')
        if "messages" in row:
            return self.llm.encode_messages(row["messages"])
        return self.llm.encode(row["prompt"])

    def _merge_options(self, n: int, row: dict[str, Any]) -> dict[str, Any]:
        """The line's options over the defaults. Structured output of a line replaces that of the defaults."""
        options = {name: value for name, value in row.items() if name in OPTIONS and value is not None}
        structured = StructuredOutputOptions.__annotations__
        replaced = structured if any(name in options for name in structured) else ()
        defaults = {name: value for name, value in self.defaults.items() if name not in replaced}
        if "seed" in defaults:
            defaults["seed"] = (defaults["seed"] + n - 1) % 2**63
        if isinstance(bias := options.get("logit_bias"), dict):  # keys of JSON objects are strings
            options["logit_bias"] = {int(id) if id.strip().isdecimal() else id: x for id, x in bias.items()}
        return defaults | options

    def _build_request(self, options: dict[str, Any]) -> Request:
        """The request; lines with the same structured output share one compiled grammar."""
        structured = {name: options.pop(name) for name in StructuredOutputOptions.__annotations__ if name in options}
        key = json.dumps(structured)
        if key not in self._grammars:
            self._grammars[key] = self.llm.build_request(**structured).grammar
        return replace(self.llm.build_request(**options), grammar=self._grammars[key])


# ------------------------------------------------------------------ the output

RERUN = "free disk space and run the same command again: finished replies are kept"


class Output:
    """The JSONL file of results. An unfinished last line of a killed run is dropped; complete lines stay."""

    def __init__(self, path: Path, known: set[Id]):
        self.path, self.done = path, set[Id]()
        with report_write_errors(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            lock_file(self._file)
            with report_write_errors(path):
                self._size = self._read_done(known)
                self._file.truncate(self._size)
        except (BlockingIOError, OneblockError) as error:
            self._file.close()
            is_locked = isinstance(error, BlockingIOError)
            raise OneblockError(f"{path}: another process is writing it" if is_locked else str(error)) from None

    def _read_done(self, known: set[Id]) -> int:
        """Collect the ids of complete lines; return their size in bytes."""
        self._file.seek(0)
        lines, _, _ = self._file.readall().rpartition(b"\n")
        for n, line in enumerate(lines.split(b"\n") if lines else (), 1):
            self.done.add(self._parse_id(n, line, known))
        return len(lines) + bool(lines)

    def _parse_id(self, n: int, line: bytes, known: set[Id]) -> Id:
        try:
            row = json.loads(line)
            id, _ = row["id"], row["finish_reason"]
        except (ValueError, TypeError, KeyError):
            raise OneblockError(f"{self.path}, line {n} is not a result: give another --output") from None
        if id not in known:
            raise OneblockError(f"{self.path}, line {n}: the input has no prompt {id!r}: give another --output")
        return id

    def write(self, result: Result) -> None:
        """Append one line. Where that fails (disk full) the file ends with its last complete line."""
        line = result.to_json()
        try:
            with report_write_errors(self.path, RERUN):
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
        except OneblockError:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(line)
        self.done.add(result.id)

    def close(self) -> None:
        with self._file, report_write_errors(self.path, RERUN):
            os.fsync(self._file.fileno())


def lock_file(file: IO[bytes]) -> None:
    """Lock the file; BlockingIOError where another process has it. Without effect where the system has no flock."""
    with suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def complete_file(llm: LLM, source: Path, target: Path, batch_size: int | None, defaults: Mapping[str, Any]) -> None:
    """`oneblock generate MODEL --input SOURCE --output TARGET`, with a progress bar in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if batch_size is not None:
        check_range("batch_size", batch_size, BATCH_SIZE, int)
    if source.resolve() == target.resolve():
        raise OneblockError(f"{target} is the input: give another --output")
    jobs = Reader(llm, defaults).read(source)
    output = Output(target, {job.id for job in jobs})
    waiting = [job for job in jobs if job.id not in output.done]
    before, errors, tokens = len(output.done), 0, 0
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=len(jobs), completed=before)
            for result in generate_results(llm, waiting, batch_size or choose_batch_size(llm, waiting)):
                output.write(result)
                errors, tokens = errors + (result.error is not None), tokens + len(result.ids)
                rate = tokens / max(bar.tasks[0].elapsed or 0.0, 1e-9)
                bar.update(task, advance=1, description=f"{rate:,.0f} tokens/s")
    finally:  # finished replies stay, whatever ends the run
        note = f"{len(output.done)} of {len(jobs)} prompts done ({before} by earlier runs), {tokens:,} tokens"
        print(note + (f"; {errors} failed, see the field error of their lines" if errors else ""), file=sys.stderr)
        output.close()
