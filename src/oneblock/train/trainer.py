"""One sitting of a run: what happens around the loop's steps, and how it ends."""

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
from oneblock.data.loader import BatchLoader
from oneblock.data.packed import Batch, sequential_batches
from oneblock.data.tokens import Tokens
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.model import Decoder, init_weights
from oneblock.parallel import parallelize
from oneblock.parallel.world import World
from oneblock.plan import flops, params
from oneblock.store import replace_model_folder
from oneblock.store.load import load_model
from oneblock.store.save import write_model
from oneblock.train import checkpoint, report
from oneblock.train.build import learner_for
from oneblock.train.loggers import open_loggers
from oneblock.train.loop import Metrics, Observe, State, done, start, train
from oneblock.train.losses import evaluate
from oneblock.train.machine import peak_memory, precision, use_device
from oneblock.train.nonfinite import MOST, Guard, told
from oneblock.train.options import Train
from oneblock.train.preflight import Estimate, estimate
from oneblock.train.prepare import Job, dropout_of
from oneblock.train.progress import Progress, ProgressDisplay
from oneblock.train.run import Log


def fresh(job: Job, options: Train, world: World | None = None) -> State:
    """The state of step 0: random weights, or those of --init; each rank gets its part."""
    if job.init is None:
        model = Decoder(job.spec)
        init_weights(model, options.loop.seed, options.start.zero_init_residual, options.start.embed_std)
    else:
        loaded = load_model(job.init, torch.float32).model  # its weights are pages of the file
        model = Decoder(loaded.spec)
        model.load_state_dict(loaded.state_dict())
    model = model.to(use_device(options.loop.device))
    model = parallelize.parallelize(model, world or World())
    return start(model, options.optimizer)


@contextmanager
def stopping(state: State) -> Iterator[None]:
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
def averaged(state: State) -> Iterator[None]:
    """Inside, the model has the averaged weights; one tensor at a time changes places, so none is held twice."""

    @torch.no_grad()
    def swap() -> None:
        found = dict(state.model.named_parameters())
        for name, mean in (state.ema or {}).items():
            held = found[name].clone()
            found[name].copy_(mean)
            mean.copy_(held)

    swap()
    try:
        yield
    finally:
        swap()


class Trainer:
    """Looks at a run while it goes: logs, validates, samples, saves."""

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
        self.guard = Guard(run)
        self.device = torch.device(options.loop.device)
        self.plan = plan or estimate(job, options, self.world)
        # Tokens per second if every device did products alone, at its peak
        self.peak = self.plan.peak * self.world.size / flops.train(job.spec, job.context)
        self.saved = state.step if state.step else None  # the step of the newest checkpoint
        watch = options.watch
        background = watch.async_save == "on" or (watch.async_save == "auto" and self.device.type == "cuda")
        self.saver = checkpoint.Saver(run, job.tokenizer, job.fingerprint, watch.keep, background)
        self.also: Observe | None = None
        self.val: float | None = None
        self.window = (state.tokens, time.perf_counter())  # when the last reading was taken

    def go(self, also: Observe | None = None) -> bool:
        """Train to the end, or until asked to stop; whether it came to the end. Saved in either case.

        `also` is called after every step, before this session's own looks.
        """
        self.also = also
        options, world = self.options, self.world
        pin, workers = options.loop.device.startswith("cuda"), options.loop.workers
        batches = BatchLoader(self.job.rows(options.loop), world.data_rank, world.data_ranks, workers, pin)
        dropout = dropout_of(options.dropouts)
        learner = learner_for(self.state.model, options.loop, options.objective, dropout, world)
        with self.show, self.closing(), batches, stopping(self.state):
            how = (options.loop, options.optimizer, options.schedule)
            train(self.state, batches, parallelize.wrap_ddp(learner, world), *how, self.observe, self.world)
            self.inspect()
            finished = done(self.state, options.loop) >= 1
            if self.saved != self.state.step:
                self.save()
            self.saver.wait()
            self.finish(finished)
        return finished

    @contextmanager
    def closing(self) -> Iterator[None]:
        """However the run ends, what was measured is on the disk."""
        try:
            yield
        finally:
            self.saver.linger()
            for logger in self.loggers:
                logger.close()

    def observe(self, state: State, metrics: Metrics) -> None:
        watch, last = self.options.watch, done(state, self.options.loop) >= 1

        def due(every: int) -> bool:
            return bool(every) and (last or state.step % every == 0)

        self.guard.add(metrics)
        if self.device.type == "cpu" or due(watch.log_every) or due(watch.save_every):
            self.inspect()
        if due(watch.log_every):
            self.read(metrics)
        began = time.perf_counter()
        if self.also is not None:
            self.also(state, metrics)
        if due(watch.eval_every) and self.job.val is not None:
            self.validate()
        if due(watch.sample_every):
            text = self.sample(watch.prompt, watch.sample_tokens)
            self.show.note(text + "\n", "dim")
            for logger in self.loggers:
                logger.text(state.step, text)
        if due(watch.save_every) and not last:
            self.save()
        tokens, at = self.window  # what was done aside does not count as training time
        self.window = (tokens, at + time.perf_counter() - began)

    # ------------------------------------------------------------------ looking

    def read(self, metrics: Metrics) -> None:
        loss, norm, tokens, at = float(metrics.loss), float(metrics.grad_norm), *self.window
        now = time.perf_counter()
        self.window = (self.state.tokens, now)
        speed = (self.state.tokens - tokens) / max(now - at, 1e-9)
        machine = {"speed": speed, "mfu": speed / self.peak, "memory": peak_memory(self.device)}
        self.add(
            {"step": metrics.step, "loss": loss, "lr": metrics.lr, "grad_norm": norm, "tokens": self.state.tokens}
            | {"seconds": metrics.seconds, **machine, **self.experts(metrics.step, metrics.aux_metrics)}
        )
        progress = done(self.state, self.options.loop)
        left = metrics.seconds / progress * (1 - progress)
        status = Progress(metrics.step, min(progress, 1.0), loss, left=left, **machine)
        self.show.update(status, metrics.seconds)

    def experts(self, step: int, seen: dict[str, Tensor]) -> dict[str, float]:
        """How evenly experts are used; nothing where there are none."""
        found = {"load_balancing_loss": float(seen["load_balancing_loss"])} if "load_balancing_loss" in seen else {}
        if (load := seen.get("load")) is None:
            return found
        for logger in self.loggers:
            logger.load(step, load)
        return {**found, "max_load": float(load.max()), "min_load": float(load.min())}

    def add(self, row: dict[str, float]) -> None:
        """A line of the log, here and wherever else it goes."""
        row = self.log.add(row)
        for logger in self.loggers:
            logger.add(row)

    def inspect(self) -> None:
        """Write down the steps since the last look that were no number, and stop the run where that was asked for."""
        bad = self.guard.look()
        if not bad:
            return
        if self.world.is_main:
            self.guard.write(bad)
        lost = len(self.guard.streak) >= MOST
        if self.options.loop.nonfinite == "stop" or lost:
            self.halt(bad[0], lost)
        for metrics in bad:
            self.show.note(f"{told(metrics)}; skipped, see {self.guard.path}", "yellow")

    def halt(self, first: Metrics, lost: bool) -> None:
        """Save the weights as they were before the bad steps, so that a resumed run meets these again; and end."""
        for metrics in self.guard.streak:
            self.state.step -= 1
            self.state.tokens -= metrics.tokens
        self.save()
        if self.world.is_main:
            self.picture()
        tried = f", as in all of the last {MOST} steps" if lost else ""
        skip = "" if lost else f", or pass it: oneblock train --resume {self.run} --nonfinite skip"
        raise OneblockError(
            f"{told(first)}{tried} ({self.guard.path}). The weights of step {self.state.step:,} are saved: "
            f"begin anew with a lower --lr or a longer --warmup{skip}"
        )

    def validate(self) -> None:
        assert self.job.val is not None
        state, self.val = self.state, self.held_out(self.job.val)
        row, more = {"step": state.step, "val": self.val}, ""
        if state.ema is not None:
            with averaged(state):
                row["val_ema"] = self.held_out(self.job.val)
            more = f", of the averaged weights {row['val_ema']:.4f}"
        self.add({**row, "tokens": state.tokens, "seconds": state.seconds})
        self.show.note(f"step {state.step:>6,}  validation loss {self.val:.4f}{more}", "bold")

    def held_out(self, ids: Tokens) -> float:
        """The loss on the validation text, or on its first batches."""
        options = self.options
        batches: Iterator[Batch] = sequential_batches(
            ids, self.job.context, options.loop.batch_size, self.job.documents
        )
        if options.watch.eval_batches:
            batches = islice(batches, options.watch.eval_batches)
        shared = deal_batches(batches, self.world)
        found = evaluate(self.state.model, shared, precision(options.loop), total=self.world.all_reduce_sum)
        parallelize.reshard(self.state.model)
        return found

    def sample(self, prompt: str, tokens: int) -> str:
        """What the model writes now, the prompt included; nothing where its weights are spread over ranks."""
        if not self.world.is_main or not self.world.has_full_weights:
            return ""
        llm = LLM(self.state.model, self.job.tokenizer)
        ids = self.job.prompt_ids(prompt)
        room = max(1, min(tokens, self.job.spec.context - len(ids)))
        with torch.compiler.set_stance("force_eager"):  # a cache's shapes would be compiled one by one
            reply = llm.generate(ids, max_tokens=room, temperature=0.8, seed=self.options.loop.seed)
        return prompt + (reply.text or "")

    # ------------------------------------------------------------------ keeping

    def save(self) -> None:
        self.saver.save(self.state)
        self.saved = self.state.step

    def finish(self, finished: bool) -> None:
        """What a run leaves beside its checkpoints: pictures, a report, and the averaged model where there is one."""
        state, watch = self.state, self.options.watch
        if finished and state.ema is not None and self.world.is_main and self.world.has_full_weights:
            with averaged(state), replace_model_folder(self.run / "ema") as new:
                write_model(new, state.model)
                self.job.tokenizer.save(new)
        sample = self.sample(watch.prompt, watch.sample_tokens) if finished else None
        if self.world.is_main:
            self.picture()
            report.write(self, sample)

    def picture(self) -> Path:
        return self.log.picture(f"{self.options.model}, {params.total(self.job.spec):,} parameters")
