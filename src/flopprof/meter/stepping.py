"""The steps of a loop, one after another: opened, closed, numbered, and made into records in good time."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from flopprof.errors import UsageError
from flopprof.meter.checks import whole
from flopprof.meter.history import History
from flopprof.meter.logged import Logged
from flopprof.meter.recorder import Recorder
from flopprof.meter.steps import OpenStep
from flopprof.meter.summary import checked_name

# Records of steps are made so many at a time, where nobody waits for one: each alone finds its code out of the caches.
_TOGETHER = 256


class Stepping:
    """What a meter does at the ends of each step. sizes: tokens and samples of one, or how a batch tells them."""

    _ends_known = True  # when a step is over
    _closed = False

    def __init__(
        self,
        recorder: Recorder,
        history: History,
        *,
        sizes: tuple[Any, Any],
        skip: int,
        recount_every: int | None,
        log: Callable[[dict[str, float]], object] | None,
        log_every: int,
    ) -> None:
        self._recorder, self._history = recorder, history
        self._clock, self._sizes = recorder.clock, sizes
        self.skip, self.recount_every = skip, recount_every
        self.log, self.log_every = log, log_every
        # Where nobody says when a step is over, nobody says which it is; those that call nothing are counted at times.
        recorder.needs_calls, history.own_count = self._ends_known, not self._ends_known
        self._repeats = self._ends_known and not any(map(callable, sizes))
        self._repeat = recorder.repeat
        self._repeat.loop = weakref.ref(self)
        self._late: deque[OpenStep] = deque()
        self._latest: Any = None  # segments of the latest step that a record was made of at once
        self._begun = 0  # steps, restarts included
        self._first = 0  # of this process

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        raise NotImplementedError

    # --- a step ------------------------------------------------------------------------------------------------------
    def step(self, batch: Any = None) -> AbstractContextManager[None]:
        """One step; an exception leaves it out of every figure. batch: what tokens= and samples= are read off."""
        return self._repeat if batch is None else _Step(self, batch)

    def start_step(self, batch: Any = None, *, data_wait_s: float = 0.0) -> None:
        """Begin a step, for loops that call back: `end_step` ends it."""
        repeat = self._repeat
        if repeat.left > 0 and not repeat.thread:
            repeat.waited = data_wait_s
            repeat.__enter__()
        else:
            self._open_step(batch, data_wait_s=data_wait_s)

    def end_step(self, *, failed: bool = False, left_early: bool = False) -> None:
        """End the step: failed ones are in no figure; one that a loop left early is, if it did what steps do."""
        if self._repeat.on and not failed and not left_early:
            self._repeat.__exit__(None)
        else:
            self._close_step(failed=failed, left_early=left_early)

    def _open_step(self, batch: Any = None, *, data_wait_s: float = 0.0) -> None:
        if self._open is not None:
            raise UsageError("a step of this meter is open: steps do not nest. End it, or use two meters.")
        if self._closed:
            raise UsageError(
                "this meter is closed and sees no more steps: close it after the last one, or make another."
            )
        self._fold()
        step = OpenStep()
        step.number = number = self._begun
        step.batch, step.data_wait_s = batch, data_wait_s
        every = self.recount_every
        recount = every is not None and number > self._first and number % every == 0
        self._recorder.open(step, recount=recount, learns=self._repeats)
        if step.left_out:  # it is counted, which may correct what is held true of the steps before it
            self._settle()

    def _close_step(self, *, failed: bool = False, left_early: bool = False) -> None:
        step = self._open
        if step is None:
            raise UsageError("no step of this meter is open: start_step() begins one.")
        self._fold()
        step.number = self._begun
        self._recorder.close(step, failed=failed)
        step.host_end = self._clock()
        if step.number - self._first < self.skip:
            step.left_out = ("first", *step.left_out)
        if failed:
            step.left_out = ("failed", *step.left_out)
        elif left_early and not self._whole(step):
            if not step.calls and not step.optimizer_steps:
                return  # the loop was left before the step did anything
            step.left_out = ("interrupted", *step.left_out)
        self._begun += 1
        if step.batch is not None:
            self._measure(step)
        self._late.append(step)
        if not step.left_out:  # before anything is told: what is done there may change what comes
            self._repeat.left, self._repeat.at_once = self._ahead(), self._history.at_once
        if self.log is not None and self._begun % self.log_every == 0:
            self.log(Logged(self.metrics(), step=self._begun))
        else:
            self._settle_soon()

    @property
    def _open(self) -> OpenStep | None:
        """The step under way."""
        return self._recorder.at_length()

    def _ahead(self) -> int:
        """So many steps may go by before one must be looked at more closely than whether it is like the last one."""
        ahead = self._recorder.ahead(_TOGETHER)
        if self.log is not None:
            ahead = min(ahead, self.log_every - 1 - self._begun % self.log_every)
        if self.recount_every is not None:
            ahead = min(ahead, -self._begun % self.recount_every)
        return ahead

    def _fold(self) -> None:
        """Take in the steps that were like the last one."""
        for step in self._recorder.followed():
            step.number = self._begun
            self._begun += 1
            self._late.append(step)

    def _whole(self, step: OpenStep) -> bool:
        """Of a loop that was left in this step: had the step done what one does?"""
        return step.optimizer_steps > 0 or any(
            step.segments == other.segments for other in self._late
        ) or self._history.knows(step.segments)  # fmt: skip

    def _measure(self, step: OpenStep) -> None:
        """Tokens and samples, where the caller says how to read them off the batch; which is then let go."""
        tokens, samples = self._sizes
        if callable(tokens):
            step.tokens = whole("what tokens= gives", tokens(step.batch), 0)
        if callable(samples):
            step.samples = whole("what samples= gives", samples(step.batch), 0)
        step.batch = None

    @contextmanager
    def pause(self, name: str = "pause") -> Iterator[None]:
        """Time that is no part of the step (saving a checkpoint, evaluating, generating): a row of its own."""
        checked_name(name)
        if self._open is None:
            self._evaluated()
            start = self._clock()
            try:
                yield
            finally:
                self.passed(name, self._clock() - start)
            return
        self._recorder.pause(name)
        try:
            yield
        finally:
            self._recorder.resume()

    def passed(self, name: str, seconds: float) -> None:
        """So long something took that lay between two steps: a row of its own."""
        self._fold()
        self._recorder.forget_outside()
        self._history.passed(checked_name(name), seconds, step=self._begun)

    def _evaluated(self) -> None:
        """What was evaluated between steps, if anything was, is over."""
        if self._recorder.between.start is not None:
            self._fold()
            self._recorder.end_outside(self._begun)

    def go_on_from(self, step: int) -> None:
        """The next step has that number: the run was resumed from a checkpoint."""
        if self._open is not None:
            raise UsageError("a step of this meter is open: go on from a number between steps.")
        self._settle()
        self._recorder.forget()
        self._begun = self._first = step

    # --- records -----------------------------------------------------------------------------------------------------
    def _settle_soon(self) -> None:
        late = self._late
        step = late[-1]
        if step.segments != self._latest or step.left_out or len(late) >= _TOGETHER or self._history.at_once:
            self._latest = step.segments
            self._settle()

    def _settle(self, *, wait: bool = False) -> None:
        """Make records of the steps that the device is past, in order."""
        self._fold()
        late = self._late
        while late and self._history.add(late[0], self._sizes, wait=wait):
            late.popleft()


class _Step:
    """A step as a block; a class, because that costs a third of what a generator does."""

    __slots__ = ("_batch", "_meter")

    def __init__(self, meter: Stepping, batch: Any) -> None:
        self._meter, self._batch = meter, batch

    def __enter__(self) -> None:
        self._meter.start_step(self._batch)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._meter.end_step(failed=kind is not None)
