"""A step under way, and one that does what the step before it did: that is held against it in as little as can be.

What runs at an event of a step finds its code and its objects out of the processor's caches, and that is what metering
costs. So once two steps in a row were the same, and everything in a third was known, the next ones are only compared
with that one, event by event. The first difference, and all that is out of the ordinary (a pause, an exception, another
model), makes an open step of it, as if it had been followed at length from its start.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from flopprof.meter.places import Done, Segment
from flopprof.meter.timing import HostTimer, Timer

if TYPE_CHECKING:
    from flopprof.meter.watching import Listener

_thread = threading.get_ident
_modes = torch._C._len_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at
_nodes_made = torch._C._autograd._get_sequence_nr


NO_PAUSES: dict[str, float] = {}


class OpenStep:
    """A step under way, or one that no record was made of yet."""

    calls = optimizer_steps = tokens = samples = compilations = 0
    other_tokens = other_samples = 0  # of calls that autograd does not record
    number = 0
    batch: Any = None
    data_wait_s = 0.0
    start: Any = None
    end: Any = None
    host_end = 0.0
    segments: tuple[Done, ...] = ()
    spans: tuple[tuple[str, Any, Any], ...] = ()  # name ("" is evaluation), start, end
    unpadded: tuple[Any, ...] = ()
    left_out: tuple[str, ...] = ()
    unseen = False

    def ordinary(self) -> bool:
        """Is it like most steps are?"""
        return not (self.spans or self.unpadded or self.left_out or self.unseen)

    def times(self, timer: Timer, *, wait: bool) -> tuple[float, float, dict[str, float]] | None:
        """(seconds in all, of evaluation, of each pause); None where the device is not past the step yet."""
        whole = timer.seconds(self.start, self.end, wait=wait)
        if whole is None:
            return None
        if not self.spans:
            return whole, 0.0, NO_PAUSES
        evaluation = 0.0
        paused: dict[str, float] = {}
        for name, start, end in self.spans:
            passed = timer.seconds(start, end, wait=True) or 0.0
            if name:
                paused[name] = paused.get(name, 0.0) + passed
            else:
                evaluation += passed
        return whole, evaluation, paused

    def again(self) -> OpenStep:
        """One more like it. (copy.copy takes five times as long.)"""
        step = OpenStep()
        step.__dict__.update(self.__dict__)
        return step


def _open_modes() -> tuple[int, ...]:
    return tuple(id(_mode_at(i)) for i in range(_modes()))


def _is_backward(event: Any) -> bool:
    return isinstance(event, tuple) and event[1:2] == ("backward",)


class Moment(NamedTuple):
    """Where a step is when an event comes, which begins with how many nodes autograd made since the step's start."""

    event: Any
    step: OpenStep
    segment: Segment | None
    segments: int  # that are over


class Here(NamedTuple):
    """A tracker's place in a step. made: nodes that there were at the latest event; modes: at the step's start."""

    segment: Segment | None
    trail: list[Done]
    made: int
    modes: int


class Loop(Protocol):
    """Who opens and closes the steps that are not like the one before."""

    def _open_step(self, batch: Any = None, *, data_wait_s: float = 0.0) -> None:
        """Begin a step."""

    def _close_step(self, *, failed: bool) -> None:
        """End it."""

    def _settle(self) -> None:
        """Make records of the steps that are over."""


class Repeat:
    """The steps that do what the one before them did; as a block, one step.

    thread  that a step is open in, repeated or not; 0 between steps
    on      one is under way that was the same so far
    left    so many steps may be repeated before one is followed at length; below 0: not even the one under way
    events  of the step before, each with the nodes that autograd had made in the step; at last, all of those
    at      so many of these have come
    in_a_row  some are backward passes without another event between them
    made    nodes that there were at the start
    blind   numbers of nodes tell nothing
    waited  seconds that the data of the step under way was waited for
    at_once  a record of each is made when it ends
    """

    __slots__ = (
        *("at", "at_once", "blind", "done", "events", "in_a_row", "left", "listener", "loop", "made", "on", "thread"),
        *("waited", "_clock", "_compilations", "_mark", "_modes", "_moments", "_start", "_step"),
    )

    def __init__(self, listener: Listener) -> None:
        self.listener = weakref.ref(listener)
        self.loop: Callable[[], Loop | None] = lambda: None
        self.thread = self.left = self.at = self.made = self._compilations = 0
        self.on = self.at_once = self.blind = self.in_a_row = False
        self._mark: Callable[[], Any] = time.perf_counter
        self._clock: Callable[[], float] | None = None  # the host's, where marks are not of its own
        self._start: Any = None
        self.waited = 0.0
        self.events: list[Any] = []
        self._modes: tuple[int, ...] = ()
        self.done: list[tuple[Any, Any, float, float]] = []  # start, end, end of the host, wait for data
        self._moments: list[Moment] = []
        self._step = OpenStep()

    # --- at every step -----------------------------------------------------------------------------------------------
    def __enter__(self) -> None:
        """A step begins, to be held against the one before."""
        if self.left <= 0 or self.thread:
            loop = self.loop()
            if loop is not None:
                loop._open_step()
            return
        self.left -= 1
        self.at = 0
        self.on = True
        self.made = _nodes_made()
        self.thread = _thread()
        self._start = self._mark()

    def __exit__(self, kind: type[BaseException] | None = None, _value: object = None, _trace: object = None) -> None:
        """A step ends: one like that before, or one that must be closed."""
        if (
            kind is None
            and self.on
            and self.events[self.at] == (0 if self.blind else _nodes_made() - self.made)
            and self.left >= 0
        ):
            end = self._mark()
            self.on = False
            self.thread = 0
            self.done.append((self._start, end, end if self._clock is None else self._clock(), self.waited))
            self.waited = 0.0
            loop = self.loop() if self.at_once else None
            if loop is not None:
                loop._settle()
            return
        loop = self.loop()
        if loop is not None:
            loop._close_step(failed=kind is not None)

    # --- now and then ------------------------------------------------------------------------------------------------
    def tell_time(self, timer: Timer) -> None:
        """What marks the ends of a step. A clock of the user's may keep the meter alive: it is not kept here."""
        of_host = isinstance(timer, HostTimer)
        self._mark = self._moment if of_host and timer.mark is not time.perf_counter else timer.mark
        self._clock = None if of_host else self._host_time

    def _moment(self) -> Any:
        listener = self.listener()
        return 0.0 if listener is None else listener.timer.mark()

    def _host_time(self) -> float:
        listener = self.listener()
        return 0.0 if listener is None else listener.clock()

    def nodes(self) -> int:
        """That autograd made in the step under way, if they tell anything. (What runs at every step says so itself.)"""
        return 0 if self.blind else _nodes_made() - self.made

    def opened(self, *, blind: bool) -> None:
        """A step is followed at length from its start. blind: numbers of nodes tell nothing."""
        self.on, self.left, self.blind = False, 0, blind
        self.made, self.thread = _nodes_made(), _thread()

    def learn(self, moments: list[Moment], step: OpenStep) -> None:
        """A step has ended that the next ones may be held against; the last of its moments is its end."""
        self._moments, self._step = moments, step
        self._compilations = step.compilations
        self._modes = _open_modes()
        self.events = events = [moment.event for moment in moments]
        self.in_a_row = any(_is_backward(event) and _is_backward(after) for event, after in pairwise(events))

    def open(self) -> tuple[OpenStep, Here]:
        """The step under way, to be followed at length from here on; and where it is."""
        moment = self._moments[self.at]
        step = moment.step.again()
        step.start, step.data_wait_s, step.compilations = self._start, self.waited, self._compilations
        made = self.made + (self.events[self.at - 1][0] if self.at else 0)
        # Of a mode that was not open then and is open now, it is not known whether it was opened in this step.
        now = _open_modes()
        modes = len(now) if now in (self._modes, ()) else -1
        self.on, self.left, self.waited = False, 0, 0.0
        return step, Here(moment.segment, [*self._step.segments[: moment.segments]], made, modes)

    def followed(self) -> Iterator[OpenStep]:
        """The steps that are over and were not told of yet."""
        done, self.done = self.done, []
        for start, end, host_end, waited in done:
            step = self._step.again()
            step.start, step.end, step.host_end, step.data_wait_s = start, end, host_end, waited
            yield step
