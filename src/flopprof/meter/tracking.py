"""Which piece of a step is running, and what it multiplies: counted when it is new, looked up when it is known.

A step is a sequence of events: calls of the models, backward passes, optimizer steps. Each opens a segment that lasts
until the next event. What a segment multiplies follows from the events since the last call that began a new graph, so
segments are places in a tree of those events; inside a place, the integers of all events on the way tell counts apart,
and a form may be fitted over them. That a step of eight micro-batches of other lengths is new then costs nothing: each
of its segments is known.

How many autograd nodes a segment made is one of these integers: two segments of the same inputs of which one skips a
layer, runs one checkpointed, or is differentiated further, differ in it. (Compiled code makes other nodes than what it
stands for: there they are not looked at.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flopprof.meter.arguments import Structure
from flopprof.meter.compiling import anything_compiled, in_compiled
from flopprof.meter.models import Roots
from flopprof.meter.opening import StepCounter
from flopprof.meter.places import MOST, Done, Ints, Lead, Place, Segment, Start, Tree, led
from flopprof.meter.steps import Here
from flopprof.meter.trail import Trail
from flopprof.profile import Attention

logger = logging.getLogger(__name__)

_nodes_made = torch._C._autograd._get_sequence_nr
Ended = tuple[Any, Segment | None, Done | None]
# So often a segment is counted again because it made other nodes than when it was counted.
_DOUBTS = 2
# So often a step is counted because something in the one before it could not be.
_TRIES = 3


class Tracker:
    """The events of a step under way, and everything counted so far."""

    def __init__(self, models: Roots, attention: Attention) -> None:
        self._models = models
        self._attention = attention
        self.counter = StepCounter(models, attention)
        self.whole = False  # this step is counted from its start on
        self.from_start = True  # the next step is counted from its start on
        self.late = False  # a call is seen where it is too late to count it: what it runs is compiled
        self.widened = 0  # places that all that comes before in a step tells apart
        self.corrections = 0  # counts that showed an earlier count or form of the same segment to be wrong
        self.tree = Tree()
        self._steps = 0
        self._due: set[int] = set()  # steps to count, because something came again after as many steps
        self._first: Segment | None = None  # of a step that nothing is told of
        self._segment: Segment | None = None
        self._graph: Done | None = None  # what autograd recorded last, where another segment runs
        self._trail = Trail()
        self._made = 0
        self._suspended: tuple[Segment | None, int] | None = None  # what ran, and the nodes that there were
        self._closure = False
        self._optimizers: dict[Structure, list[Structure]] = {}  # by class and parameters: by those that had a gradient

    @property
    def blind(self) -> bool:
        """Nodes are not looked at: something runs compiled."""
        return self.tree.sight.blind

    # --- events ------------------------------------------------------------------------------------------------------
    def begin(self, structure: Structure = (), ints: Ints = (), *, recount: bool = False) -> None:
        """A step begins; structure and ints of what it is given, where only that tells steps apart."""
        self._trail = Trail()
        self._closure = False
        self.counter.begin()
        self._graph = None
        self._steps += 1
        first = self._first
        wanted = recount or self.from_start or (self._steps in self._due)
        if first is not None and first.start.known and not structure and not wanted:
            self.whole = False
            self._segment = first
            self._made = _nodes_made()
            return
        self._segment = None
        if wanted:
            self.from_start = False
            self._due.discard(self._steps)
            if self._models.compiled():
                self.lose_sight()
            self.counter.enter()
        self.whole = wanted
        segment = self._enter(self.tree.start.child(structure).start(ints), None)
        if not structure:
            self._first = segment

    def passed(self, steps: int) -> None:
        """So many steps have gone by that did what the one before them did."""
        self._steps += steps

    def go_on(self, here: Here) -> None:
        """Follow a step from here on."""
        self._steps += 1
        self._segment, trail, self._made, modes = here
        self._trail = Trail(trail)
        self._closure = self.whole = False
        self.counter.go_on(modes)
        self._graph = None

    def here(self) -> tuple[Segment | None, int]:
        """The segment that runs, and how many are over."""
        return self._segment, len(self._trail)

    def ahead(self, most: int) -> int:
        """So many of the next steps, at most, are known to need no count."""
        if self.from_start or self.counter.open is not None:
            return 0
        return min([most, *(due - self._steps - 1 for due in self._due if due > self._steps)])

    def known(self, event: Any, *, aside: bool = False) -> Any:
        """What the caller keeps with an event that is known to follow here; None where it must be described.

        aside: a call that autograd does not record.
        """
        segment = self._segment
        if segment is None or self.counter.open is not None or segment.start.place.ambiguous:
            return None
        if segment.start.place.aside and not aside:
            segment = self._trail.ended(segment)
        made = _nodes_made()
        since = 0 if self.tree.sight.blind else made - self._made
        edge = segment.edges.get((since, event, *self._trail.key(segment.start.place)))
        if edge is None or not edge[1].start.known or len(self._trail) + 1 in edge[1].start.awaited:
            return None
        segment.start.matched = True
        self._made = made
        self._trail.append(edge[0])
        self._segment = edge[1]
        return edge[2]

    def call(self, event: Any, structure: Structure, ints: Ints, kept: Any, *, records: bool) -> None:
        """A model is called. event: what tells the call apart at once; records: autograd records it."""
        lead = structure, ints
        if not records:
            self._follow(event, structure, ints, kept, lead)
            return
        key, before, done = self._end(event, lead)
        graph = self._graph
        if graph is None or graph.place.over:
            start = self.tree.calls.child(structure).start(ints)
        else:
            start = graph.place.child(structure).start(graph.ints + ints)
        self._link(key, before, done, self._enter(start, None), kept)

    def backward(self, event: Structure) -> bool:
        """A backward pass starts. Is it counted from here on?

        It is told by the calls since the graph before was done with, or by those in a row that led to it without one.
        """
        opened = self.counter.open is None
        key, before, done = self._end(event)
        graph = self._graph
        place, ints = (self.tree.calls, ()) if graph is None else (graph.place, graph.ints)
        ended = graph is None or graph.place.over
        if ended and done is not None and before is not None and before.start.place.row:
            place, ints = place.child(("behind", done.place.name)), ints + done.ints
        self._link(key, before, done, self._enter(place.child(event).start(ints), None), True)
        return opened and self.counter.open is not None

    def optimizer_event(self, event: Structure, stepped: Callable[[], int]) -> tuple[Structure, bool]:
        """What an optimizer's step is told by; does it multiply, and by what is stepped is it told then?"""
        kinds = self._optimizers.setdefault(event, [])
        multiplies = any(work.hardware_flops for kind in kinds for work in self.tree.alone.child(kind).known.values())
        if kinds and not multiplies and self.counter.open is None:
            return kinds[0], False
        kind = "optimizer", event, stepped()
        if kind not in kinds:
            kinds.append(kind)
        return kind, multiplies

    def optimizer(self, event: Structure, *, closure: bool) -> None:
        """An optimizer steps. What it does between calls of its closure depends on its state, and is left out."""
        self._follow(event, event, (), True)
        self._closure = closure

    def after_closure(self) -> None:
        """The step of an optimizer with a closure is over."""
        self._follow("over", ("over",), (), True)
        self._closure = False

    def suspend(self) -> None:
        """What runs from here to `resume` is no part of the step."""
        self._suspended = self._segment, _nodes_made()
        self._segment = None
        self.counter.suspend()

    def resume(self) -> None:
        """What runs from here on belongs to the segment that ran before."""
        if self._suspended is not None:
            (self._segment, made), self._suspended = self._suspended, None
            self._made += _nodes_made() - made
            self.counter.resume()

    def finish(self) -> tuple[Done, ...]:
        """The step is over: its segments. Their work is known then, but where one must be counted another time."""
        segment = None if self._segment is None else self._trail.ended(self._segment)
        if self.counter.open is None and segment is not None and not segment.start.place.apart:
            done = segment.ends.get(0 if self.tree.sight.blind else _nodes_made() - self._made)
            if done is not None and done.work is not None:
                segment.start.matched |= segment.start.known
                self._segment = None
                self._trail.append(done)
                return tuple(self._trail)
        self._settle()
        self.counter.leave()
        return tuple(self._trail)

    def abandon(self) -> None:
        """The step was interrupted: what its last segment would have multiplied is not known."""
        self._segment = None
        self.counter.leave()
        self._trail = Trail()

    def lose_sight(self) -> None:
        """Something runs compiled: from now on, nodes are not looked at, nor those that were counted."""
        if not self.tree.sight.blind:
            self.tree.sight.blind = True
            self._first = None
            for _, _, place in self.tree.places():
                place.forget_nodes()

    # --- resuming ----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Everything counted, as plain values."""
        return {"corrections": self.corrections, "widened": self.widened, **self.tree.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.corrections, self.widened = state["corrections"], state.get("widened", 0)
        self._first = None
        self.from_start = self.tree.restore(state) <= 3

    # --- segments ----------------------------------------------------------------------------------------------------
    def _follow(self, event: Any, structure: Structure, ints: Ints, kept: Any, lead: Lead | None = None) -> None:
        """Something that autograd does not record: what it recorded before goes on behind it. lead: if it is a call."""
        key, before, done = self._end(event, lead, aside=lead is not None)
        graph = self._graph
        if graph is not None and graph.place.told:  # all that tells this step from others
            start = graph.place.child(structure).start(graph.ints + ints)
        else:
            start = self.tree.alone.child(structure).start(ints)
        self._link(key, before, done, self._enter(start, graph), kept)

    def _end(self, event: Any, lead: Lead | None = None, *, aside: bool = False) -> Ended:
        """The running segment ends with this event: the key of that, the segment, and what is left of it."""
        before = self._segment
        if before is not None and not aside:
            before = self._segment = self._trail.ended(before)
        made = 0 if self.tree.sight.blind else _nodes_made() - self._made
        key = (made, event) if before is None else (made, event, *self._trail.key(before.start.place))
        by = "call" if lead is not None else event if isinstance(event, str) else event[0]
        return key, before, self._settle(lead, aside=aside, by=by)

    def _link(self, key: Any, before: Segment | None, done: Done | None, segment: Segment, kept: Any) -> None:
        if before is not None and done is not None and done.work is not None and not before.start.place.ambiguous:
            if len(before.edges) >= MOST:
                before.edges.clear()
            before.edges[key] = done, segment, kept

    def _enter(self, start: Start, graph: Done | None) -> Segment:
        """A segment begins. graph: what autograd recorded before it, where it does not record this."""
        segment = self._segment = start.segment(graph)
        self._made = _nodes_made()
        if self.counter.open is None and not self._is_known(segment):
            self._count_now(start)
        return segment

    def _is_known(self, segment: Segment) -> bool:
        """Is it known what the segment multiplies that begins? (In a row, whether it is the last one is seen later.)"""
        start, at = segment.start, len(self._trail)
        left = start.awaited.pop(at, 0)
        if left:
            missed = self._trail.ended(segment).start.missed
            if missed and left > 1:
                start.awaited[at] = left - 1
            return not missed
        if not start.known and start.place.aside:
            start.known = self._trail.ended(segment).start.known
        return start.known

    def _settle(self, lead: Lead | None = None, *, aside: bool = False, by: str = "") -> Done | None:
        """The segment that runs is over. lead: the call that ended it; aside: which autograd does not record.

        by: the kind of event that did.
        """
        segment, self._segment = self._segment, None
        work = self.counter.take(optimizer=not self._closure)
        if segment is None:
            return None
        if not aside:
            segment = self._trail.ended(segment)
        made = 0 if self.tree.sight.blind else _nodes_made() - self._made
        if lead is not None and segment is self._first:
            segment = led(segment, made, lead, work)
        done = segment.end(made)
        self._graph = done if segment.start.place.recorded else segment.graph
        start = segment.start
        wide = start.place.wide
        done, before = self._trail.close(done, work, by)
        self.widened += start.place.wide and not wide
        if work is not None:
            start.ended.add(lead is not None)
            if before is not None:
                self.corrections += 1
                logger.warning(
                    "a segment of a step multiplies %d FLOPs, where %d were counted: its signature does not tell all",
                    work.hardware_flops,
                    before.hardware_flops,
                )
        elif done.work is None:
            self._doubt(start, called=lead is not None)
        elif made in start.counts:
            start.matched = True
        return done

    def _doubt(self, start: Start, *, called: bool) -> None:
        """Uncounted, it made other nodes than in any count: another branch, which is counted when it comes again."""
        start.miss()
        start.wait(len(self._trail) - 1)
        if start.place.aside or not self._countable(start.place):
            self._try_again(start.place)
        start.doubts += called in start.ended
        if start.doubts > _DOUBTS and not start.matched and len(start.counts) == 1:
            self.lose_sight()  # counted it always makes those, uncounted never: a compiled function

    # --- counting ----------------------------------------------------------------------------------------------------
    def _countable(self, place: Place) -> bool:
        """Where a graph begins, in a plain call or backward: what runs from there on needs nothing that ran before.

        The backward of a compiled forward runs other operators than those that it stands for; in a step of an
        optimizer, hooks are being called that a counter would add to.
        """
        plain = place.plain and self._attention == "full" and not anything_compiled()
        return (place.depth == 0 or plain) and place.opens and not self._closure

    def _count_now(self, start: Start) -> None:
        place = start.place
        if self._countable(place) and self.counter.may_open():
            if in_compiled():
                self.late = True
                self._try_again(place)
            else:
                self.counter.enter()
        else:
            self._try_again(place)

    def _try_again(self, place: Place) -> None:
        """What is not known here is counted when it comes again: in the next step, or after as many as before."""
        if place.missed and self._steps > place.missed:
            self._due.add(2 * self._steps - place.missed)
        if self._steps != place.missed:
            place.tries += 1
            place.missed = self._steps
        if place.tries <= _TRIES:
            self.from_start = True
