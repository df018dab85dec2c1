"""Which piece of a step is running, and what it multiplies: counted when it is new, looked up when it is known.

A step is a sequence of events: calls of the models, backward passes, optimizer steps. Each opens a segment that lasts
until the next event. What a segment multiplies follows from the events since the last call that began a new graph, so
segments are places in a tree of those events; inside a place, the integers of all events on the way tell counts apart,
and a form may be fitted over them. That a step of eight micro-batches of other lengths is new then costs nothing: each
of its segments is known.

How many autograd nodes a segment made is the last of its integers: two segments of the same inputs of which one skips
a layer, runs one checkpointed, or differentiates another loss, differ in it. (Compiled code makes other nodes than
what it stands for: there they are not looked at.)
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec
import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode

from flopprof.counting.runtime import FlopCounter
from flopprof.counting.tally import Tally
from flopprof.meter.fitting import Fit, fitted
from flopprof.meter.signature import Structure
from flopprof.meter.work import Work, work_of
from flopprof.profile import Attention

logger = logging.getLogger(__name__)

_modes = torch._C._len_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at
_nodes_made = torch._C._autograd._get_sequence_nr
# Of the counts of one place, so many are fitted to; a place that this many do not fit is not tried again each time.
_MOST_SAMPLES = 32
# After so many evaluations of a form the next one is counted instead, which proves it again or refutes it.
_CHECKS = frozenset(4**k for k in range(2, 20))
_MOST_EDGES = 1 << 14
# So often a segment is counted again because it made other nodes than when it was counted.
_DOUBTS = 2

Ints = tuple[int, ...]


class Done:
    """A segment that is over: a place, and all of its integers. Its work may become known later."""

    __slots__ = ("ints", "place", "work")

    def __init__(self, place: Place, ints: Ints) -> None:
        self.place, self.ints = place, ints
        self.work: Work | None = None


class Start:
    """A place with the integers that are known when a segment begins there."""

    __slots__ = ("counts", "doubts", "ints", "known", "place", "segments")

    def __init__(self, place: Place, ints: Ints) -> None:
        self.place, self.ints = place, ints
        self.known = False  # counted at these integers, or inside a form
        self.counts: set[int] = set()  # nodes made, in each count
        self.doubts = 0
        self.segments: dict[Segment | None, Segment] = {}


class Segment:
    """A segment that runs.

    graph: the segment whose graph the next backward or call goes on with: itself, or one before it where this is of
    work that autograd does not record. edges: event -> (this segment's end, the next, what is kept with the event).
    """

    __slots__ = ("edges", "ends", "graph", "start")

    def __init__(self, start: Start, graph: Segment | None) -> None:
        self.start = start
        self.graph = graph
        self.edges: dict[Any, tuple[Done, Segment, Any]] = {}
        self.ends: dict[int, Done] = {}


class Place:
    """A place in the tree of events.

    recorded: autograd follows these events; over: with the last of them a graph was done with.
    """

    __slots__ = (
        *("children", "depth", "done", "evaluations", "fit", "known", "over", "recorded", "refuted", "starts", "whole"),
    )

    def __init__(self, depth: int, *, recorded: bool, over: bool) -> None:
        self.depth = depth  # 0 where a graph begins: nothing before it matters
        self.recorded = recorded
        self.over = over
        self.children: dict[Structure, Place] = {}
        self.starts: dict[Ints, Start] = {}
        self.done: dict[Ints, Done] = {}
        self.known: dict[Ints, Work] = {}
        self.fit: Fit | None = None
        self.evaluations = 0
        self.refuted = 0
        self.whole = True  # every count saw the events before it, too

    def child(self, structure: Structure) -> Place:
        """The place after one more event."""
        found = self.children.get(structure)
        if found is None:
            over = self.over or structure[:1] == ("backward",)
            found = self.children[structure] = Place(self.depth + 1, recorded=self.recorded, over=over)
        return found

    def start(self, ints: Ints) -> Start:
        """A segment of these integers begins here, known or not."""
        found = self.starts.get(ints)
        if found is None:
            if len(self.starts) >= _MOST_EDGES:
                self.starts.clear()
            found = self.starts[ints] = Start(self, ints)
        if not found.known and self.fit is not None and self.fit.covers(ints):
            self.evaluations += 1
            found.known = self.evaluations not in _CHECKS
        return found

    def end(self, ints: Ints) -> Done:
        """The segment of these integers, over."""
        found = self.done.get(ints)
        if found is None:
            if len(self.done) >= _MOST_EDGES:
                self.done.clear()
            found = self.done[ints] = Done(self, ints)
        if found.work is None:
            found.work = self.known.get(ints)
            if found.work is None and self.fit is not None:
                numbers = self.fit.at(ints)
                found.work = None if numbers is None else Work.of_numbers(numbers)
        return found

    def learn(self, ints: Ints, work: Work) -> Work | None:
        """Note a count; returns the other one that was held true here until now, if there was one."""
        done = self.end(ints)
        before, done.work = done.work, work
        self.note(ints, work, again=before is not None and before.numbers() != work.numbers())
        if before is None or before.numbers() == work.numbers():
            return None
        self.refuted += 1
        for other in self.done.values():
            other.work = self.known.get(other.ints)
        return before

    def note(self, ints: Ints, work: Work, *, again: bool = False) -> None:
        """A count is true here; again: fit anew, whatever there is."""
        self.known[ints] = work
        start = self.starts.get(ints[:-1]) or self.start(ints[:-1])
        start.known = True
        start.counts.add(ints[-1])
        if again or self.fit is None or self.fit.at(ints) is None:
            self._fit()

    def _fit(self) -> None:
        self.fit = None
        if len(self.known) < 2 or any(work.assumptions for work in self.known.values()):
            return
        count = len(self.known)
        if count > _MOST_SAMPLES and count & (count - 1):
            return
        latest = list(self.known.items())[-_MOST_SAMPLES:]
        self.fit = fitted({ints: work.numbers() for ints, work in latest})


class Models(Protocol):
    """The models of a meter."""

    def named(self) -> torch.nn.Module | None:
        """What names the counter's modules."""

    def compiled(self) -> bool:
        """Does a part of them run compiled?"""


class Tracker:
    """The events of a step under way, and everything counted so far."""

    def __init__(self, models: Models, attention: Attention) -> None:
        self._models = models
        self._attention = attention
        self.counter: FlopCounter | None = None
        self.from_start = True  # the next step is counted from its start on
        self.blind = False  # nodes made tell nothing: something runs compiled
        self.corrections = 0  # counts that showed an earlier count or form of the same segment to be wrong
        self._matched = False  # a segment made as many nodes uncounted as when it was counted
        self._segment: Segment | None = None
        self._first: Segment | None = None  # of a step that nothing is told of
        self._last: Segment | None = None  # the graph that was under way where a segment was cut short
        self._trail: list[Done] = []
        self._made = 0
        self._modes = 0
        self._closure = False
        self._start, self._calls, self._alone = _roots()

    # --- events ------------------------------------------------------------------------------------------------------
    def begin(self, structure: Structure = (), ints: Ints = (), *, recount: bool = False) -> None:
        """A step begins; structure and ints of what it is given, where that tells steps apart."""
        self._trail = []
        self._closure = False
        self._modes = _modes()
        self._last = None
        first = self._first
        if first is not None and first.start.known and not (structure or recount or self.from_start):
            self._segment = first
            self._made = _nodes_made()
            return
        self._segment = None
        if recount or self.from_start:
            self.from_start = False
            if self._models.compiled():
                self.blind = True
            self._open()
        segment = self._enter(self._start.child(structure).start(ints), None)
        if not structure:
            self._first = segment

    def known(self, event: Any) -> Any:
        """What the caller keeps with an event that is known to follow here; None where it must be described."""
        segment = self._segment
        if segment is None or self.counter is not None:
            return None
        made = _nodes_made()
        edge = segment.edges.get((0 if self.blind else made - self._made, event))
        if edge is None or not edge[1].start.known:
            return None
        self._made = made
        self._trail.append(edge[0])
        self._segment = edge[1]
        return edge[2]

    def call(self, event: Any, structure: Structure, ints: Ints, kept: Any, *, records: bool) -> None:
        """A model is called. event: what tells the call apart at once; records: autograd records it."""
        graph = self._graph()
        if not records:
            self._follow(event, self._alone.child(structure), ints, kept)
        elif graph is None or graph.start.place.over:
            self._follow(event, self._calls.child(structure), ints, kept)
        else:
            self._follow(event, graph.start.place.child(structure), graph.start.ints + ints, kept)

    def backward(self, event: Structure) -> bool:
        """A backward pass starts, over the calls since the graph before was done with. Is it counted from here on?"""
        graph, before = self._graph(), self.counter
        place, ints = (self._calls, ()) if graph is None else (graph.start.place, graph.start.ints)
        self._follow(event, place.child(event), ints, True)
        return before is None and self.counter is not None

    def optimizer(self, event: Structure, *, closure: bool) -> bool:
        """An optimizer steps. What it does between calls of its closure depends on its state, and is left out."""
        before = self.counter
        self._follow(event, self._alone.child(event), (), True)
        self._closure = closure
        return before is None and self.counter is not None

    def after_closure(self) -> bool:
        """The step of an optimizer with a closure is over."""
        before = self.counter
        self._follow("over", self._alone.child(("over",)), (), True)
        self._closure = False
        return before is None and self.counter is not None

    def interrupt(self) -> None:
        """What runs from here to the next event is no part of the step."""
        self._settle()
        if self.counter is not None and _mode_at(_modes() - 1) is self.counter:
            self._leave()

    def finish(self) -> tuple[Done, ...]:
        """The step is over: its segments. Their work is known then, but where one must be counted again."""
        segment = self._segment
        if self.counter is None and segment is not None:
            done = segment.ends.get(0 if self.blind else _nodes_made() - self._made)
            if done is not None and done.work is not None:
                self._segment = None
                self._trail.append(done)
                return tuple(self._trail)
        self._settle()
        if self.counter is not None:
            self._leave()
        return tuple(self._trail)

    def abandon(self) -> None:
        """The step was interrupted: what its last segment would have multiplied is not known."""
        self._segment = None
        if self.counter is not None:
            self._leave()
        self._trail = []

    def lose_sight(self) -> None:
        """Something runs compiled: from now on, nodes are not looked at, and what was counted by them is forgotten."""
        if not self.blind:
            self.blind = True
            self._start, self._calls, self._alone = _roots()
            self._first = None
            self.from_start = True

    # --- resuming ----------------------------------------------------------------------------------------------------
    def _places(self) -> Iterator[tuple[int, Structure, Place]]:
        """Every place with the number of the one above it and the event between them; the three roots have none."""
        waiting: deque[tuple[int, Structure, Place]] = deque(
            (-1, (), root) for root in (self._start, self._calls, self._alone)
        )
        number = 0
        while waiting:
            above, event, place = waiting.popleft()
            yield above, event, place
            waiting.extend((number, event, child) for event, child in place.children.items())
            number += 1

    def numbered(self) -> Callable[[tuple[Done, ...]], list[Any]]:
        """What writes segments down by their places' numbers."""
        numbers = {id(place): number for number, (_, _, place) in enumerate(self._places())}
        return lambda segments: [(numbers.get(id(done.place), -1), done.ints) for done in segments]

    def found(self, numbers: list[Any]) -> tuple[Done, ...]:
        """The segments that were written down."""
        places = [place for _, _, place in self._places()]
        return tuple(places[number].end(tuple(ints)) for number, ints in numbers if number >= 0)

    def state(self) -> dict[str, Any]:
        """Everything counted, as plain values."""
        return {
            "blind": self.blind,
            "corrections": self.corrections,
            "places": [
                (above, event, [(ints, msgspec.to_builtins(work)) for ints, work in place.known.items()])
                for above, event, place in self._places()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.blind, self.corrections = state["blind"], state["corrections"]
        places: list[Place] = []
        roots = _roots()
        for above, event, known in state["places"]:
            place = roots[len(places)] if above < 0 else places[above].child(event)
            for ints, work in known:
                place.note(tuple(ints), msgspec.convert(work, Work))
            places.append(place)
        self._start, self._calls, self._alone = roots
        self._first = None
        self.from_start = len(places) <= 3

    # --- segments ----------------------------------------------------------------------------------------------------
    def _graph(self) -> Segment | None:
        """The segment whose graph a call or a backward goes on with."""
        return self._last if self._segment is None else self._segment.graph

    def _follow(self, event: Any, place: Place, ints: Ints, kept: Any) -> None:
        before, graph = self._segment, self._graph()
        key = (0 if self.blind else _nodes_made() - self._made, event)
        done = self._settle()
        segment = self._enter(place.start(ints), graph)
        if before is not None and done is not None and done.work is not None:
            if len(before.edges) >= _MOST_EDGES:
                before.edges.clear()
            before.edges[key] = done, segment, kept

    def _enter(self, start: Start, graph: Segment | None) -> Segment:
        """A segment begins. graph: where autograd does not record it, that which the next one goes on with."""
        segment = start.segments.get(graph)
        if segment is None:
            if len(start.segments) >= _MOST_EDGES:
                start.segments.clear()
            segment = start.segments[graph] = Segment(start, graph)
            if start.place.recorded:
                segment.graph = segment
        self._segment = segment
        self._made = _nodes_made()
        if self.counter is None and not start.known:
            self._count_now(start.place)
        return segment

    def _settle(self) -> Done | None:
        """The segment that runs is over."""
        segment, self._segment = self._segment, None
        counter = self.counter
        tally = None
        if counter is not None:
            tally, counter._tally = counter._tally, Tally()
        if segment is None:
            return None
        self._last = segment.graph
        made = 0 if self.blind else _nodes_made() - self._made
        start = segment.start
        ints = (*start.ints, made)
        done = start.place.end(ints)
        if len(segment.ends) < _MOST_EDGES:
            segment.ends[made] = done
        self._trail.append(done)
        if tally is not None and counter is not None:
            work = work_of(tally.profile(counter._names.frames, counter.model, self._attention))
            self._learn(start.place, ints, work.without_optimizer() if self._closure else work)
        elif done.work is None:
            self._doubt(start)
        elif made in start.counts:
            self._matched = True
        return done

    def _learn(self, place: Place, ints: Ints, work: Work) -> None:
        before = place.learn(ints, work)
        if before is not None:
            self.corrections += 1
            logger.warning(
                "a step's segment multiplies %d FLOPs where %d were counted before: its signature does not tell all",
                work.hardware_flops,
                before.hardware_flops,
            )

    def _doubt(self, start: Start) -> None:
        """Uncounted, it made other nodes than in any count: another branch, which is counted when it comes again."""
        self.from_start = True
        start.doubts += 1
        if start.doubts > _DOUBTS and not self._matched and len(start.counts) == 1:
            self.lose_sight()  # counted it always makes those, uncounted never: a compiled function

    # --- counting ----------------------------------------------------------------------------------------------------
    def _count_now(self, place: Place) -> None:
        # A mode may be opened inside other contexts of the loop's only where it is sure to be closed before them.
        if _modes() == self._modes:
            self._open()
            if place.depth > 0:  # the calls before it ran unseen: masks told there are not known here
                self.from_start |= place.whole
                place.whole = False
        else:
            self.from_start = True

    def _open(self) -> None:
        counter = FlopCounter(self._models.named(), attention=self._attention)
        counter.__enter__()
        self.counter = counter

    def _leave(self) -> None:
        counter, self.counter = self.counter, None
        assert counter is not None
        above = []
        while _modes() and _mode_at(_modes() - 1) is not counter:  # somebody left a mode of their own open
            above.append(_pop_mode())
        counter.__exit__(None, None, None)
        for mode in reversed(above):
            _push_mode(mode)


def _roots() -> tuple[Place, Place, Place]:
    """Of starts of steps, of calls and backward passes that make a graph, and of everything else."""
    start, alone = (Place(-1, recorded=False, over=False) for _ in range(2))
    return start, Place(-1, recorded=True, over=False), alone
