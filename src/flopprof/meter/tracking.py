"""Which piece of a step is running, and what it multiplies: counted when it is new, looked up when it is known.

A step is a sequence of events: calls of the models, backward passes, optimizer steps. Each opens a segment that lasts
until the next event. What a segment multiplies follows from the events since the last call that began a new graph, so
segments are places in a tree of those events; inside a place, the integers of all events on the way tell counts apart,
and a form may be fitted over them. That a step of eight micro-batches of different lengths is new then costs nothing:
each of its segments is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode

from flopprof.counting.runtime import FlopCounter
from flopprof.counting.tally import Tally
from flopprof.meter.fitting import Fit, fitted
from flopprof.meter.signature import Structure
from flopprof.meter.work import Work, total, work_of
from flopprof.profile import Attention

logger = logging.getLogger(__name__)

_modes = torch._C._len_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at
# Of the counts of one place, so many are fitted to; a place that this many do not fit is not tried again each time.
_MOST_SAMPLES = 32
# After so many evaluations of a form the next one is counted instead, which proves it again or refutes it.
_CHECKS = frozenset(4**k for k in range(2, 20))
_MOST_EVALUATED = 1 << 16

Ints = tuple[int, ...]
Segment = tuple["Place", Ints]


class Place:
    """A place in the tree of events."""

    __slots__ = ("children", "depth", "evaluated", "evaluations", "fit", "known", "refuted", "structure", "whole")

    def __init__(self, structure: Structure, depth: int) -> None:
        self.structure = structure
        self.depth = depth  # 0 where a graph begins: nothing before it matters
        self.children: dict[Structure, Place] = {}
        self.known: dict[Ints, Work] = {}
        self.fit: Fit | None = None
        self.evaluated: dict[Ints, Work] = {}
        self.evaluations = 0
        self.refuted = 0
        self.whole = True  # every count saw the events before it, too

    def child(self, structure: Structure) -> Place:
        """The place after one more event."""
        found = self.children.get(structure)
        if found is None:
            found = self.children[structure] = Place(structure, self.depth + 1)
        return found

    def work(self, ints: Ints) -> Work | None:
        """What is multiplied here at these sizes; None where it must be counted."""
        return self.known.get(ints) or self.evaluated.get(ints) or self._evaluate(ints)

    def _evaluate(self, ints: Ints) -> Work | None:
        if self.fit is None:
            return None
        numbers = self.fit.at(ints)
        if numbers is None:
            return None
        self.evaluations += 1
        if self.evaluations in _CHECKS:
            return None
        if len(self.evaluated) > _MOST_EVALUATED:
            self.evaluated.clear()
        work = self.evaluated[ints] = Work.of_numbers(numbers)
        return work

    def learn(self, ints: Ints, work: Work) -> Work | None:
        """Note a count; returns the other one that was held true here until now, if there was one."""
        before = self.known.get(ints) or self.evaluated.pop(ints, None)
        if before is None and self.fit is not None:
            numbers = self.fit.at(ints)
            before = None if numbers is None else Work.of_numbers(numbers)
        self.known[ints] = work
        wrong = before is not None and before.numbers() != work.numbers()
        if wrong or self.fit is None or self.fit.at(ints) is None:
            self.evaluated.clear()
            self._fit()
        self.refuted += wrong
        return before if wrong else None

    def _fit(self) -> None:
        self.fit = None
        if len(self.known) < 2 or any(work.assumptions for work in self.known.values()):
            return
        count = len(self.known)
        if count > _MOST_SAMPLES and count & (count - 1):
            return
        latest = list(self.known.items())[-_MOST_SAMPLES:]
        self.fit = fitted({ints: work.numbers() for ints, work in latest})


class Tracker:
    """The events of a step under way, and everything counted so far."""

    def __init__(self, names: Callable[[], torch.nn.Module | None], attention: Attention) -> None:
        self._names = names
        self._attention = attention
        self.start = Place(("start",), 0)
        self.calls = Place(("calls",), -1)
        self.alone = Place(("alone",), -1)
        self.steps: dict[tuple[Segment, ...], Work] = {}
        self.counter: FlopCounter | None = None
        self.from_start = True  # the next step is counted from its start on
        self.corrections = 0  # counts that showed an earlier count or form of the same segment to be wrong
        self.counted_segments = 0
        self._trail: list[Segment] = []
        self._place: Place = self.alone
        self._ints: Ints = ()
        self._segment: Segment | None = None
        self._modes = 0
        self._graph_over = True
        self._closure = False

    # --- events ------------------------------------------------------------------------------------------------------
    def begin(self, structure: Structure, ints: Ints, *, recount: bool = False) -> None:
        """A step begins."""
        self._trail = []
        self._place, self._ints, self._segment, self._graph_over = self.alone, (), None, True
        self._closure = False
        self._modes = _modes()
        start = self.start if not structure else self.start.child(structure)
        if recount or self.from_start:
            self.from_start = False
            self._open()
        self._enter((start, ints))

    def call(self, structure: Structure, ints: Ints, *, records: bool) -> None:
        """A model is called; `records`: autograd records it."""
        if not records:
            self._enter((self.alone.child(structure), ints))
            return
        if self._graph_over:
            self._place, self._ints, self._graph_over = self.calls.child(structure), ints, False
        else:
            self._place, self._ints = self._place.child(structure), self._ints + ints
        self._enter((self._place, self._ints))

    def backward(self, structure: Structure) -> None:
        """A backward pass starts, over the calls since the graph before was done with."""
        self._place = self._place.child(structure)
        self._graph_over = True
        self._enter((self._place, self._ints))

    def optimizer(self, structure: Structure, *, closure: bool) -> None:
        """An optimizer steps. What it does between calls of its closure depends on its state, and is left out."""
        self._enter((self.alone.child(structure), ()))
        self._closure = closure

    def after_closure(self) -> None:
        """The step of an optimizer with a closure is over."""
        self._enter((self.alone.child(("after closure",)), ()))
        self._closure = False

    def interrupt(self) -> None:
        """What runs from here to the next event is no part of the step."""
        if self.counter is not None:
            self._settle(self.counter)
            if _mode_at(_modes() - 1) is self.counter:
                self._leave(self.counter)
        self._segment = None

    def finish(self) -> tuple[Segment, ...]:
        """The step is over: its segments, each with its sizes. Their work is then known, or it is None."""
        self._close()
        return tuple(self._trail)

    def abandon(self) -> None:
        """The step was interrupted: what its last segment would have multiplied is not known."""
        if self.counter is not None:
            self._leave(self.counter)
        self._trail = []

    def work(self, segments: tuple[Segment, ...]) -> Work | None:
        """What a step of these segments multiplies; None where one of them was not counted yet."""
        known = self.steps.get(segments)
        if known is None:
            parts = [place.work(ints) for place, ints in segments]
            if any(part is None for part in parts):
                return None
            known = total(part for part in parts if part is not None)
            if len(self.steps) > _MOST_EVALUATED:
                self.steps.clear()
            self.steps[segments] = known
        return known

    @property
    def counting(self) -> bool:
        """Is this step being counted?"""
        return self.counter is not None

    # --- counting ----------------------------------------------------------------------------------------------------
    def _enter(self, segment: Segment) -> None:
        if self.counter is not None:
            self._settle(self.counter)
        self._trail.append(segment)
        self._segment = segment
        if self.counter is None:
            place, ints = segment
            if ints not in place.known and place.work(ints) is None:
                self._count_now(place)

    def _count_now(self, place: Place) -> None:
        # A mode may be opened inside other contexts of the loop's only where it is sure to be closed before them.
        if _modes() == self._modes:
            self._open()
            if place.depth > 0:  # the calls before it ran unseen: masks told there are not known here
                self.from_start = place.whole
                place.whole = False
        else:
            self.from_start = True

    def _open(self) -> None:
        counter = FlopCounter(self._names(), attention=self._attention)
        counter.__enter__()
        self.counter = counter

    def _settle(self, counter: FlopCounter) -> None:
        """Note what the segment that ends now multiplied."""
        tally, counter._tally = counter._tally, Tally()
        if self._segment is None:
            return
        place, ints = self._segment
        work = work_of(tally.profile(counter._names.frames, counter.model, self._attention))
        before = place.learn(ints, work.without_optimizer() if self._closure else work)
        self.counted_segments += 1
        if before is not None:
            self.corrections += 1
            self.steps.clear()
            logger.warning(
                "a step's segment multiplies %d FLOPs where %d were counted before: its signature does not tell all",
                work.hardware_flops,
                before.hardware_flops,
            )

    def _close(self) -> None:
        if self.counter is not None:
            self._settle(self.counter)
            self._leave(self.counter)

    def _leave(self, counter: FlopCounter) -> None:
        self.counter = None
        above = []
        while _modes() and _mode_at(_modes() - 1) is not counter:  # somebody left a mode of their own open
            above.append(_pop_mode())
        counter.__exit__(None, None, None)
        for mode in reversed(above):
            _push_mode(mode)
