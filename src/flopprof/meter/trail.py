"""The segments of a step that are over, and what tells those apart that their own events do not. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, repeat
from operator import mul
from typing import Any

from flopprof.meter.places import Context, Done, Ints, Place, Segment, number
from flopprof.meter.work import Work

# What came before is kept of steps of so many segments, at most.
_MOST_BEFORE = 256


class Trail(list[Done]):
    """The segments of one step, in order."""

    def __init__(self, segments: Iterable[Done] = ()) -> None:
        super().__init__(segments)
        self._counts: dict[Done, Work] = {}  # of this step
        self._times: dict[Place, int] = {}  # so often a segment of it ended there, where that matters

    def close(self, done: Done, work: Work | None, by: str) -> tuple[Done, Work | None]:
        """One more is over: as what it is told apart, and the other count that was held true of that until now.

        by: the kind of event that ended it.

        Most are told by their events. Where these are not enough in one step, by their number in it; where they are
        not enough from step to step, by all that came before them in the step, and what came then: behind a backward
        pass runs what would run behind the optimizer's step, in steps without one. work: what was counted.
        """
        before = None
        if done.place.ambiguous or (work is not None and self._is_another(done, work)):
            done = self._again(done, work)
        if work is not None:
            done, before = self._learn(done, work, by)
        elif done.place.wide:
            done = _after(done, self._context(by))
        self.append(done)
        return done, before

    def ended(self, segment: Segment) -> Segment:
        """A segment that is over: behind calls in a row that autograd does not record, all of them tell it.

        What follows them works on what all of them gave: on every chunk of a batch, say.
        """
        place = segment.start.place
        if not place.aside:
            return segment
        row: dict[Place, list[Ints]] = {place: [segment.start.ints]}
        for done in reversed(self):
            call = done.plain or done
            if not call.place.aside:
                break
            row.setdefault(call.place, []).append(call.ints[:-1])
        names = {member: member.name for member in row} | {place: 0}
        event: list[Any] = ["row"]
        ints: list[int] = []
        for member in sorted(row, key=names.__getitem__):
            name = names[member]
            told, found = _in_a_row(row[member], place.kinds.get(name, ()))
            event.append((name, told))
            ints += found
        start = place.child((*event,)).start((*ints,))
        start.begun = segment.start
        return start.segment(segment.graph)

    def key(self, place: Place) -> tuple[Done, ...]:
        """What an edge out of that place is told by, beside the event."""
        return tuple(self) if place.wide else ()

    def _is_another(self, done: Done, work: Work) -> bool:
        """Did the same multiply something else in this very step?

        Then what came before it in the step matters, too: after the last of several micro-batches, say, something runs
        outside the models. From now on these are told by their number in the step.
        """
        before = self._counts.setdefault(done, work)
        if before.flops == work.flops:
            return False
        done.place.tell_apart(ambiguous=True)
        for i, other in enumerate(self):
            if other is done:
                self[i], _ = self._learn(self._again(done, before), before, [*self, done][i + 1].place.kind)
        return True

    def _again(self, done: Done, work: Work | None) -> Done:
        """What is over, told by how often it was before in this step."""
        place = done.place
        times = self._times[place] = self._times.get(place, -1) + 1
        if work is not None:
            place.note(done.ints, work)
        return place.child(("again", times)).end(done.ints)

    def _learn(self, done: Done, work: Work, by: str) -> tuple[Done, Work | None]:
        """A count is true of this; the other one that was held true until now, if there was one."""
        place, before, context, then = done.place, done.work, self._context(by), done.context
        if len(self) <= _MOST_BEFORE:
            done.context = context
        if not place.wide and before is not None and before.flops != work.flops and then not in (None, context):
            place.tell_apart(wide=True)
            _after(done, then).place.learn(_after(done, then), before)
        if place.wide:
            place.note(done.ints, work)
            done = _after(done, context)
        return done, done.place.learn(done, work)

    def _context(self, by: str) -> Context:
        """All that came before in the step, and the kind of event that ends this."""
        context: list[Done] = []
        for done in self:
            told = done.plain or done
            while told.place.row and context and context[-1].place.aside:
                context.pop()
            context.append(told)
        return tuple(context), by


def works(segments: Sequence[Done]) -> Iterator[Work | None]:
    """What each segment of a step that is past multiplied; None where that is not counted.

    It may have been seen since that what came before a segment matters.
    """
    for i, done in enumerate(segments):
        if done.place.wide and done.plain is None:
            by = segments[i + 1].place.kind if i + 1 < len(segments) else ""
            done = _after(done, Trail(segments[:i])._context(by))
        yield done.place.end(done.ints).work if done.work is None else done.work


def _in_a_row(calls: list[Ints], before: Ints) -> tuple[tuple[Ints, Ints], Ints]:
    """Calls at one place, the latest first: how each of their integers is told, and their number with what tells them.

    0: what is the same in all calls, by that; 1: what differs in the latest alone, by that and the sum; 2: all else by
    these, the greatest, the sum of squares, and sums of products with others like it. before: how they were told in
    rows before, of which none is told by less in this one.
    """
    kinds: list[int] = []
    ints, uneven = [len(calls)], []
    for values, least in zip(zip(*calls, strict=True), before or repeat(0), strict=False):
        latest, others = values[0], {*values[1:]}
        kinds.append(max(least, 2 if len(others) > 1 else int(not others <= {latest})))
        ints.append(latest)
        if kinds[-1] > 0:
            ints.append(sum(values))
        if kinds[-1] > 1:
            ints += [max(values), sum(value * value for value in values)]
            uneven.append(values)
    several = [*dict.fromkeys(uneven)]
    ints += [sum(map(mul, a, b)) for a, b in combinations(several, 2)]
    return ((*kinds,), (*map(several.index, uneven),)), (*ints,)


def _after(done: Done, context: Context) -> Done:
    """What is over, told by all that came before it: a graph that lives on behind another's backward pass, say."""
    before, by = context
    place = done.place.child(("after", number(repr(([other.place.name for other in before], by)))))
    found = place.end((*(value for other in before for value in other.ints), *done.ints))
    found.plain = done
    return found
