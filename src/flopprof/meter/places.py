"""The tree of a step's events: what is known at each place, and the forms fitted there. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import msgspec

from flopprof.meter.fitting import Forms
from flopprof.meter.work import Work

Ints = tuple[int, ...]
Lead = tuple[tuple[Any, ...], Ints]  # a call's structure and integers
_KINDS = ("backward", "optimizer", "over")
# So many entries a table holds before it is begun anew: it only saves time.
MOST = 1 << 14
# So many steps in a row are counted, at most, to see the end of a row that comes now and then.
_MOST_TRIES = 64
# After so many evaluations of a form the next one is counted instead, which proves it again or refutes it.
_CHECKS = frozenset(4**k for k in range(2, 20))


class Sight:
    """Do the numbers of autograd nodes tell anything?"""

    __slots__ = ("blind",)

    def __init__(self) -> None:
        self.blind = False


class Done:
    """A segment that is over: a place, and all of its integers. Its work may become known later.

    Numbers of nodes are among the integers as -1 - nodes, so that they can be told from sizes. plain: where all that
    came before tells it apart, the same without that. context: what that was when it was counted.
    """

    __slots__ = ("context", "ints", "place", "plain", "work")

    def __init__(self, place: Place, ints: Ints) -> None:
        self.place, self.ints = place, ints
        self.work: Work | None = None
        self.plain: Done | None = None
        self.context: Context | None = None


Context = tuple[tuple[Done, ...], str]  # all that came before in a step, and the kind of event that came then


class Start:
    """A place with the integers that are known when a segment begins there.

    known    counted at these integers, or inside a form
    counts   nodes made, in each count
    ended    in a count, by a call of a model, or not
    matched  uncounted, it made as many nodes as in a count
    missed   uncounted, it made others: no form tells it, and it is counted when it comes again
    doubts   so often it made others than in any count, but ended as there
    begun    where a segment began that turned out to be the last of a row: what runs behind that is told here
    awaited  behind so many segments of a step, it was the last of a row that was never counted: tries that are left
    tries    so often that row is looked for when it ended uncounted: ever more often
    """

    __slots__ = (
        *("awaited", "begun", "counts", "doubts", "ended", "ints", "known", "matched", "missed", "place", "segments"),
        *("tries",),
    )

    def __init__(self, place: Place, ints: Ints) -> None:
        self.place, self.ints = place, ints
        self.known = self.matched = self.missed = False
        self.counts: set[int] = set()
        self.ended: set[bool] = set()
        self.doubts = 0
        self.begun: Start | None = None
        self.awaited: dict[int, int] = {}
        self.tries = 1
        self.segments: dict[Done | None, Segment] = {}

    def segment(self, graph: Done | None) -> Segment:
        """The segment that runs here, behind what autograd recorded last."""
        found = self.segments.get(graph)
        if found is None:
            if len(self.segments) >= MOST:
                self.segments.clear()
            found = self.segments[graph] = Segment(self, graph)
        return found

    def miss(self) -> None:
        """Uncounted, it made other nodes."""
        self.missed, self.known = True, False

    def wait(self, at: int) -> None:
        """Uncounted, it was the last of a row, behind so many segments: it is counted when it comes there again."""
        if self.begun is not None:
            self.begun.awaited[at] = self.tries
            self.tries = min(4 * self.tries, _MOST_TRIES)

    def count(self, made: int) -> None:
        """It was counted, and made so many nodes."""
        self.counts.add(made)
        self.missed, self.known = False, True


class Segment:
    """A segment that runs.

    graph: what autograd recorded before it, where it does not record this. edges: event -> (this segment's end, the
    next, what is kept with the event).
    """

    __slots__ = ("edges", "ends", "graph", "start")

    def __init__(self, start: Start, graph: Done | None) -> None:
        self.start, self.graph = start, graph
        self.edges: dict[Any, tuple[Done, Segment, Any]] = {}
        self.ends: dict[int, Done] = {}

    def end(self, made: int) -> Done:
        """It is over, having made so many nodes."""
        found = self.ends.get(made)
        if found is None or found.work is None:
            found = self.start.place.end((*self.start.ints, -1 - made))
            if len(self.ends) < MOST:
                self.ends[made] = found
        return found


class Place:
    """A place in the tree of events.

    recorded   autograd follows these events
    over       with the last of them a graph was done with: a call begins a new one. Not with a backward pass that makes
               a graph, which goes on in another one
    kind       of its events: a call, a backward pass, an optimizer's step, the end of that; of a step's start, none
    name       a number for the events on the way here, the same in every process
    ambiguous  what was multiplied here differed within one step
    wide       it differed from step to step: all that came before in the step matters
    busy       a step began here, and multiplied something before its first call
    told       nothing but what the step was given tells its calls apart, so that no graph is ever done with
    aside      a call that autograd does not record
    row        what runs behind the last of these in a row, which all of them tell
    kinds      of the others in such rows, by their names (its own is 0): how their integers are told
    """

    __slots__ = (
        *("ambiguous", "aside", "busy", "children", "depth", "done", "evaluations", "forms", "kind", "kinds", "known"),
        *("missed", "name", "opens", "over", "plain", "recorded", "row", "sight", "starts", "told", "tries", "wide"),
    )

    def __init__(
        self, name: int, sight: Sight, depth: int, *, recorded: bool, over: bool = False, told: bool = False
    ) -> None:
        self.name, self.sight = name, sight
        self.depth = depth  # 0 where a graph begins: nothing before it matters
        self.recorded, self.over, self.told = recorded, over, told
        self.opens = True  # a counter may be opened here
        self.ambiguous = self.wide = self.busy = False
        self.plain = False  # a call, or a backward pass that makes no graph of its own
        self.aside = self.row = False
        self.kinds: dict[int, Ints] = {}
        self.kind = ""
        self.children: dict[Any, Place] = {}
        self.starts: dict[Ints, Start] = {}
        self.done: dict[Ints, Done] = {}
        self.known: dict[Ints, Work] = {}
        self.forms: Forms | None = Forms()  # None: what is counted here is assumed, and tells nothing of other sizes
        self.evaluations = self.missed = self.tries = 0

    def child(self, structure: Any) -> Place:
        """The place after one more event."""
        found = self.children.get(structure)
        if found is None:
            backward = structure[:1] == ("backward",)
            told = self.told or (self.depth < 0 and structure[:1] == ("given",))
            found = Place(
                number(f"{self.name} {structure!r}"),
                self.sight,
                self.depth + 1,
                recorded=self.recorded or told,
                over=(self.over or (backward and not structure[3])) and not told,
                told=told,
            )
            call = type(next(iter(structure), None)) is int
            found.kind = "call" if call else structure[0] if structure[:1] and structure[0] in _KINDS else self.kind
            found.plain = not structure[3] if backward else call
            again = structure[:1] == ("again",)
            found.aside = self.aside if again else call and self.depth < 0 and not found.recorded
            found.row = structure[:1] == ("row",) or (again and self.row)
            if structure[:1] == ("row",):
                self.kinds |= {name: kinds for name, (kinds, _) in structure[1:]}
            found.opens = structure[:1] != ("optimizer",)
            self.ambiguous |= structure[:1] == ("again",)
            self.wide |= structure[:1] == ("after",)
            self.children[structure] = found
        return found

    @property
    def apart(self) -> bool:
        """Do events alone not tell what is multiplied here?"""
        return self.ambiguous or self.wide

    def start(self, ints: Ints) -> Start:
        """A segment of these integers begins here, known or not."""
        if self.sight.blind:
            ints = _without_nodes(ints)
        found = self.starts.get(ints)
        if found is None:
            if len(self.starts) >= MOST:
                self.starts.clear()
            found = self.starts[ints] = Start(self, ints)
            for done in self.known:
                if done[:-1] == ints:
                    found.known = True
                    found.counts.add(-1 - done[-1])
        if not (found.known or found.missed) and self.forms is not None and self.forms.at(ints) is not None:
            self.evaluations += 1
            found.known = self.evaluations not in _CHECKS
        return found

    def end(self, ints: Ints) -> Done:
        """The segment of these integers, over."""
        if self.sight.blind:
            ints = _without_nodes(ints)
        found = self.done.get(ints)
        if found is None:
            if len(self.done) >= MOST:
                self.done.clear()
            found = self.done[ints] = Done(self, ints)
        if found.work is None:
            found.work = None if self.wide else self.known.get(ints)
            if found.work is None and self.forms is not None and not self.wide:
                numbers = self.forms.at(ints)
                found.work = None if numbers is None else Work.of_numbers(numbers)
        return found

    def learn(self, done: Done, work: Work) -> Work | None:
        """Note a count; returns the other one of FLOPs that was held true here until now, if there was one."""
        before, done.work = done.work, work
        self.note(done.ints, work)
        if before is None or before.numbers() == work.numbers():
            return None
        for other in self.done.values():
            if other is not done:
                other.work = self.known.get(other.ints)
        for start in self.starts.values():
            start.known = bool(start.counts) and not start.missed
        return None if before.flops == work.flops else before

    def note(self, ints: Ints, work: Work) -> None:
        """A count is true here."""
        self.known[ints] = work
        self.tries = 0
        start = self.start(ints[:-1])
        start.count(-1 - ints[-1])
        self._tell(ints, work)

    def _tell(self, ints: Ints, work: Work) -> None:
        if work.assumptions:
            self.forms = None
        elif self.forms is not None:
            self.forms.add(ints, work.numbers())

    def tell_apart(self, *, ambiguous: bool = False, wide: bool = False) -> None:
        """Events do not tell what is multiplied here: its number in the step does, or all that came before in it."""
        self.ambiguous |= ambiguous
        self.wide |= wide
        for start in self.starts.values():
            for segment in start.segments.values():
                segment.edges.clear()
                segment.ends.clear()

    def recall(self, known: dict[Ints, Work]) -> None:
        """What was counted in another process."""
        self.known = known
        self.busy = any(work.hardware_flops for work in known.values())
        self._fit_anew()

    def _fit_anew(self) -> None:
        self.forms = Forms()
        for ints, work in self.known.items():
            self._tell(ints, work)

    def forget_nodes(self) -> None:
        """Numbers of nodes tell nothing from now on: what was counted holds whatever they are."""
        self.starts = {}
        known, self.known = self.known, {}
        done, self.done = self.done, {}
        for ints, work in known.items():
            plain = _without_nodes(ints)
            self.known[plain] = work
            kept = self.done[plain] = done.get(ints) or Done(self, plain)
            kept.ints, kept.work = plain, work
        self._fit_anew()


def led(segment: Segment, made: int, lead: Lead, work: Work | None) -> Segment:
    """What a step begins with, before any call: where that multiplies something, the call after it tells how much."""
    place = segment.start.place
    if work is not None:
        place.busy |= bool(work.hardware_flops)
    if not place.busy:
        return segment
    if work is not None:
        place.note(segment.end(made).ints, work)
    structure, ints = lead
    return place.child(("before", *structure)).start(ints).segment(None)


class Tree:
    """All places: under starts of steps, under calls and backward passes that make a graph, and everything else."""

    def __init__(self) -> None:
        self.sight = Sight()
        self.start = Place(0, self.sight, -1, recorded=False)
        self.calls = Place(1, self.sight, -1, recorded=True)
        self.alone = Place(2, self.sight, -1, recorded=False)

    def places(self) -> Iterator[tuple[int, Any, Place]]:
        """Every place with the number of the one above it and the event between them; the three roots have none."""
        waiting: deque[tuple[int, Any, Place]] = deque((-1, (), root) for root in (self.start, self.calls, self.alone))
        number = 0
        while waiting:
            above, event, place = waiting.popleft()
            yield above, event, place
            waiting.extend((number, event, child) for event, child in place.children.items())
            number += 1

    def numbered(self) -> Callable[[tuple[Done, ...]], list[Any]]:
        """What writes segments down by their places' numbers."""
        numbers = {id(place): number for number, (_, _, place) in enumerate(self.places())}
        return lambda segments: [(numbers.get(id(done.place), -1), done.ints) for done in segments]

    def found(self, numbers: list[Any]) -> tuple[Done, ...]:
        """The segments that were written down."""
        places = [place for _, _, place in self.places()]
        return tuple(places[number].end(tuple(ints)) for number, ints in numbers if number >= 0)

    def state(self) -> dict[str, Any]:
        """Everything counted, as plain values."""
        return {
            "blind": self.sight.blind,
            "places": [
                (above, event, [(ints, msgspec.to_builtins(work)) for ints, work in place.known.items()])
                for above, event, place in self.places()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> int:
        """Go on from there: so many places there are."""
        self.__init__()  # type: ignore[misc]  # as it was made
        self.sight.blind = state["blind"]
        top = [self.start, self.calls, self.alone]
        places: list[Place] = []
        for above, event, known in state["places"]:
            place = top[len(places)] if above < 0 else places[above].child(event)
            place.recall({tuple(ints): msgspec.convert(work, Work) for ints, work in known})
            places.append(place)
        return len(places)


def number(told: str) -> int:
    """The same in every process, and above 0, which stands for none."""
    return 1 + int.from_bytes(blake2b(told.encode(), digest_size=7).digest())


def _without_nodes(ints: Ints) -> Ints:
    return tuple(-1 if value < 0 else value for value in ints)
