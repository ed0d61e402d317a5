"""One session of a run: training with logging, validation, samples and checkpoints around the steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from oneblock.data.batch_shards import deal_batches
from oneblock.data.packed import Batch, sequential_batches
from oneblock.data.tokens import Tokens
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.parallel.parallelize import reshard
from oneblock.parallel.world import World
from oneblock.plan import flops, params
from oneblock.store import replace_model_folder
from oneblock.store.save import write_model
from oneblock.train import checkpoint, report
from oneblock.train.loggers import open_loggers
from oneblock.train.loop import Metrics, Observe, State, progress_of, train
from oneblock.train.machine import peak_memory, precision
from oneblock.train.nonfinite import MAX_NONFINITE_STEPS, NonfiniteLog, describe_step
from oneblock.train.options import Train
from oneblock.train.preflight import Estimate, estimate
from oneblock.train.prepare import Job
from oneblock.train.progress import Progress, ProgressDisplay
from oneblock.train.run import Log
from oneblock.train.task import evaluate


@contextmanager
def stop_on_signals(state: State) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the run after the current step; a second Ctrl-C ends it at once."""
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def request_stop(number: int, frame: object) -> None:
        if state.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        state.stop = True
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would fail
            for fd in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup: keep training
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def use_ema_weights(state: State) -> Iterator[None]:
    """Swap the trained parameters with their moving averages inside the block, one tensor at a time."""

    @torch.no_grad()
    def swap() -> None:
        parameters = dict(state.named_parameters())
        for name, mean in (state.ema or {}).items():
            weight = parameters[name].clone()
            parameters[name].copy_(mean)
            mean.copy_(weight)

    swap()
    try:
        yield
    finally:
        swap()


class Trainer:
    """Trains a state and, between steps, logs, validates, samples and saves."""

    def __init__(
        self,
        job: Job,
        options: Train,
        run: Path,
        state: State,
        show: ProgressDisplay,
        plan: Estimate | None = None,
        world: World | None = None,
    ):
        self.job, self.options, self.run, self.state, self.show = job, options, run, state, show
        self.world = world or World()
        self.log = Log(run, state.step, silent=not self.world.is_main)
        self.loggers = open_loggers(run, options, state.step) if self.world.is_main else []
        self.nonfinite = NonfiniteLog(run)
        self.device = torch.device(options.loop.device)
        self.plan = plan or estimate(job, options, self.world)
        # Tokens per second if every device only multiplied matrices, at its peak
        self.peak = self.plan.peak * self.world.size / flops.train(job.spec, job.context)
        self.saved = state.step if state.step else None  # step of the newest checkpoint
        watch = options.watch
        background = watch.async_save == "on" or (watch.async_save == "auto" and self.device.type == "cuda")
        self.saver = checkpoint.Saver(run, job.tokenizer, job.fingerprint, watch.keep, background)
        self.on_step: Observe | None = None
        self.val: float | None = None
        self.window = (state.tokens, time.perf_counter())  # tokens and time at the last log line

    def go(self, on_step: Observe | None = None) -> bool:
        """Train to the end or to a stop signal, save, and return whether the run is finished.

        `on_step` is called after every step, before validation, samples and checkpoints.
        """
        self.on_step = on_step
        options = self.options
        with self.show, self.close_after(), stop_on_signals(self.state):
            train(self.state, options.loop, options.optimizer, options.schedule, self.observe, self.world)
            self.check_finite()
            finished = progress_of(self.state, options.loop) >= 1
            if self.saved != self.state.step:
                self.save()
            self.saver.wait()
            self.finish(finished)
        return finished

    @contextmanager
    def close_after(self) -> Iterator[None]:
        """Close loggers and loaders however the run ends, so that everything measured is on disk."""
        try:
            yield
        finally:
            self.saver.wait_briefly()
            self.state.task.close()
            for logger in self.loggers:
                logger.close()

    def observe(self, state: State, metrics: Metrics) -> None:
        """After each step: what is due by the intervals of the options."""
        watch, is_last = self.options.watch, progress_of(state, self.options.loop) >= 1

        def due(every: int) -> bool:
            return bool(every) and (is_last or state.step % every == 0)

        self.nonfinite.add(metrics)
        if self.device.type == "cpu" or due(watch.log_every) or due(watch.save_every):
            self.check_finite()
        if due(watch.log_every):
            self.log_metrics(metrics)
        began = time.perf_counter()
        if self.on_step is not None:
            self.on_step(state, metrics)
        if due(watch.eval_every) and self.job.val is not None:
            self.validate()
        if due(watch.sample_every):
            text = self.sample(watch.prompt, watch.sample_tokens)
            self.show.note(text + "\n", "dim")
            for logger in self.loggers:
                logger.text(state.step, text)
        if due(watch.save_every) and not is_last:
            self.save()
        tokens, at = self.window  # throughput leaves out the time of everything but training
        self.window = (tokens, at + time.perf_counter() - began)

    # ------------------------------------------------------------------ metrics

    def log_metrics(self, metrics: Metrics) -> None:
        """Log a row of metrics and update the progress display. On a GPU this waits for the step."""
        loss, tokens, at = float(metrics.loss), *self.window
        now = time.perf_counter()
        self.window = (self.state.tokens, now)
        speed = (self.state.tokens - tokens) / max(now - at, 1e-9)
        machine = {"speed": speed, "mfu": speed / self.peak, "memory": peak_memory(self.device)}
        row = {"step": metrics.step, "loss": loss, "lr": metrics.lr, "grad_norm": float(metrics.grad_norm)}
        row |= {"tokens": self.state.tokens, "seconds": metrics.seconds, **machine}
        self.add_row(row | self.aux_metrics(metrics.step, metrics.aux_metrics))
        progress = progress_of(self.state, self.options.loop)
        left = metrics.seconds / progress * (1 - progress)
        self.show.update(Progress(metrics.step, min(progress, 1.0), loss, left=left, **machine), metrics.seconds)

    def aux_metrics(self, step: int, metrics: dict[str, Tensor]) -> dict[str, float]:
        """The task's scalar metrics, and the extremes of the experts' load."""
        row = {key: float(value) for key, value in metrics.items() if value.dim() == 0}
        if (load := metrics.get("load")) is not None:
            for logger in self.loggers:
                logger.load(step, load)
            row |= {"max_load": float(load.max()), "min_load": float(load.min())}
        return row

    def add_row(self, row: dict[str, float]) -> None:
        row = self.log.add(row)
        for logger in self.loggers:
            logger.add(row)

    def check_finite(self) -> None:
        """Record steps with a NaN or Inf loss or gradient, and stop the run if the options say so."""
        bad = self.nonfinite.take()
        if not bad:
            return
        if self.world.is_main:
            self.nonfinite.write(bad)
        gives_up = len(self.nonfinite.streak) >= MAX_NONFINITE_STEPS
        if self.options.loop.nonfinite == "stop" or gives_up:
            self.stop_nonfinite(bad[0], gives_up)
        for metrics in bad:
            self.show.note(f"{describe_step(metrics)}; skipped, see {self.nonfinite.path}", "yellow")

    def stop_nonfinite(self, first: Metrics, gives_up: bool) -> None:
        """Save the state before the NaN or Inf steps, which a resumed run repeats, and raise OneblockError."""
        for metrics in self.nonfinite.streak:
            self.state.step -= 1
            self.state.tokens -= metrics.tokens
        self.save()
        if self.world.is_main:
            self.plot()
        since = f", as in each of the last {MAX_NONFINITE_STEPS} steps" if gives_up else ""
        skip = "" if gives_up else f", or skip the step: oneblock train --resume {self.run} --nonfinite skip"
        raise OneblockError(
            f"{describe_step(first)}{since} ({self.nonfinite.path}). The weights of step {self.state.step:,} are "
            f"saved: start a run with a lower --lr or a longer --warmup{skip}"
        )

    def validate(self) -> None:
        """Log the validation loss, and that of the EMA weights if there are any."""
        assert self.job.val is not None
        state, self.val = self.state, self.validation_loss(self.job.val)
        row, note = {"step": state.step, "val": self.val}, ""
        if state.ema is not None:
            with use_ema_weights(state):
                row["val_ema"] = self.validation_loss(self.job.val)
            note = f", of the EMA weights {row['val_ema']:.4f}"
        self.add_row({**row, "tokens": state.tokens, "seconds": state.seconds})
        self.show.note(f"step {state.step:>6,}  validation loss {self.val:.4f}{note}", "bold")

    def validation_loss(self, ids: Tokens) -> float:
        """The next-token loss on the validation ids, or on their first `eval_batches` batches."""
        loop, job = self.options.loop, self.job
        batches: Iterator[Batch] = sequential_batches(ids, job.context, loop.batch_size, job.documents)
        if self.options.watch.eval_batches:
            batches = islice(batches, self.options.watch.eval_batches)
        dealt = deal_batches(batches, self.world)
        loss = evaluate(self.state.model, dealt, precision(loop), total=self.world.all_reduce_sum)
        reshard(self.state.model)
        return loss

    def sample(self, prompt: str, tokens: int) -> str:
        """The prompt and a continuation by the current model; empty where the weights are sharded."""
        if not self.world.is_main or not self.world.has_full_weights:
            return ""
        llm = LLM(self.state.model, self.job.tokenizer)
        ids = self.job.prompt_ids(prompt)
        max_tokens = max(1, min(tokens, self.job.spec.context - len(ids)))
        with torch.compiler.set_stance("force_eager"):  # each length of the KV cache would be compiled
            reply = llm.generate(ids, max_tokens=max_tokens, temperature=0.8, seed=self.options.loop.seed)
        return prompt + (reply.text or "")

    # ------------------------------------------------------------------ files

    def save(self) -> None:
        self.saver.save(self.state)
        self.saved = self.state.step

    def finish(self, finished: bool) -> None:
        """Write the EMA weights of a finished run, plots and the report."""
        state, watch = self.state, self.options.watch
        if finished and state.ema is not None and self.world.is_main and self.world.has_full_weights:
            with use_ema_weights(state), replace_model_folder(self.run / "ema") as new:
                write_model(new, state.model)
                self.job.tokenizer.save(new)
        sample = self.sample(watch.prompt, watch.sample_tokens) if finished else None
        if self.world.is_main:
            self.plot()
            report.write(self, sample)

    def plot(self) -> Path:
        return self.log.picture(f"{self.options.model}, {params.total(self.job.spec):,} parameters")
