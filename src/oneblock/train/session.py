"""One sitting of a run: what happens around the loop's steps, and how it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from oneblock.data.rows import Batch, Rows, in_order
from oneblock.errors import OneblockError
from oneblock.infer.llm import LLM
from oneblock.model import Decoder, init_weights
from oneblock.plan import params
from oneblock.train import checkpoint
from oneblock.train.loop import Metrics, Observe, State, done, start, train
from oneblock.train.losses import evaluate, pretraining
from oneblock.train.machine import precision, use_device
from oneblock.train.options import Train
from oneblock.train.prepare import Job, dropout_of
from oneblock.train.run import Log
from oneblock.train.show import Reading, Show


def fresh(job: Job, options: Train) -> State:
    """Step 0."""
    model = Decoder(job.spec)
    init_weights(model, options.loop.seed)
    return start(model.to(use_device(options.loop.device)), options.optimizer)


@contextmanager
def stopping(state: State) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step that is under way; a second Ctrl-C ends it at once."""

    def ask(number: int, frame: object) -> None:
        if state.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        state.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Session:
    """Looks at a run while it goes: logs, validates, samples, saves."""

    def __init__(self, job: Job, options: Train, run: Path, state: State, show: Show):
        self.job, self.options, self.run, self.state, self.show = job, options, run, state, show
        self.log = Log(run, state.step)
        self.saved = state.step if state.step else None  # the step of the newest checkpoint
        self.also: Observe | None = None
        self.val: float | None = None
        self.window = (state.tokens, time.perf_counter())  # when the last reading was taken

    def go(self, also: Observe | None = None) -> bool:
        """Train to the end, or until asked to stop; whether it came to the end. Saved in either case.

        `also` is called after every step, before this session's own looks.
        """
        self.also = also
        options, rows = (
            self.options,
            Rows(self.job.train, self.job.context, self.options.loop.batch, self.options.loop.seed),
        )
        loss = partial(pretraining, dropout=dropout_of(options.dropouts), z_loss=options.objective.z_loss)
        with self.show, stopping(self.state):
            train(self.state, rows.batch, loss, options.loop, options.optimizer, options.schedule, self.observe)
            finished = done(self.state, options.loop) >= 1
            if self.saved != self.state.step:
                self.save()
            self.picture()
        return finished

    def observe(self, state: State, metrics: Metrics) -> None:
        watch, last = self.options.watch, done(state, self.options.loop) >= 1

        def due(every: int) -> bool:
            return bool(every) and (last or state.step % every == 0)

        if due(watch.log_every):
            self.read(metrics)
        began = time.perf_counter()
        if self.also is not None:
            self.also(state, metrics)
        if due(watch.eval_every) and self.job.val is not None:
            self.validate()
        if due(watch.sample_every):
            self.show.note(self.sample(watch.prompt, watch.sample_tokens) + "\n", "dim")
        if due(watch.save_every) and not last:
            self.save()
        tokens, at = self.window  # what was done aside does not count as training time
        self.window = (tokens, at + time.perf_counter() - began)

    # ------------------------------------------------------------------ looking

    def read(self, metrics: Metrics) -> None:
        loss, norm = float(metrics.loss), float(metrics.norm)
        if not loss < float("inf"):
            raise OneblockError(
                f"the loss is {loss} at step {metrics.step}: lower --lr or raise --warmup; "
                f"{self.run} has the last checkpoint, if one was saved"
            )
        tokens, at = self.window
        now = time.perf_counter()
        self.window = (self.state.tokens, now)
        speed = (self.state.tokens - tokens) / max(now - at, 1e-9)
        self.log.add(
            step=metrics.step,
            loss=loss,
            lr=metrics.lr,
            norm=norm,
            tokens=self.state.tokens,
            seconds=metrics.seconds,
            speed=speed,
        )
        progress = done(self.state, self.options.loop)
        left = metrics.seconds / progress * (1 - progress)
        self.show.reading(Reading(metrics.step, min(progress, 1.0), loss, speed, left), metrics.seconds)

    def validate(self) -> None:
        assert self.job.val is not None
        options = self.options
        batches: Iterator[Batch] = in_order(self.job.val, self.job.context, options.loop.batch)
        if options.watch.eval_batches:
            batches = islice(batches, options.watch.eval_batches)
        self.val = evaluate(self.state.model, batches, precision(options.loop))
        self.log.add(step=self.state.step, val=self.val)
        self.show.note(f"step {self.state.step:>6,}  validation loss {self.val:.4f}", "bold")

    def sample(self, prompt: str, tokens: int) -> str:
        """What the model writes now, the prompt included."""
        llm = LLM(self.state.model, self.job.tokenizer)
        ids = self.job.tokenizer.encode(prompt) or [int(self.job.train[0])]
        room = max(1, min(tokens, self.job.spec.context - len(ids)))
        reply = llm.generate(ids, max_tokens=room, temperature=0.8, seed=self.options.loop.seed)
        return prompt + (reply.text or "")

    # ------------------------------------------------------------------ keeping

    def save(self) -> None:
        watch = self.options.watch
        checkpoint.save(self.run, self.state, self.job.tokenizer, self.job.fingerprint, watch.keep)
        self.saved = self.state.step

    def picture(self) -> Path:
        return self.log.picture(f"{self.options.model}, {params.total(self.job.spec):,} parameters")
