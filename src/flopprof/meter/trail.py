"""The segments of a step that are over, and what tells those apart that their own events do not. No torch."""

from __future__ import annotations

from flopprof.meter.places import Done, Place, number
from flopprof.meter.work import Work

# What came before is kept of steps of so many segments, at most.
_MOST_BEFORE = 256


class Trail(list[Done]):
    """The segments of one step, in order."""

    def __init__(self, segments: list[Done] | None = None) -> None:
        super().__init__(segments or [])
        self._counts: dict[Done, Work] = {}  # of this step
        self._times: dict[Place, int] = {}  # so often a segment of it ended there, where that matters

    def close(self, done: Done, work: Work | None) -> tuple[Done, Work | None]:
        """One more is over: as what it is told apart, and the other count that was held true of that until now.

        Most are told by their events. Where these are not enough in one step, by their number in it; where they are
        not enough from step to step, by all that came before them in the step. work: what was counted.
        """
        before = None
        if done.place.ambiguous or (work is not None and self._is_another(done, work)):
            done = self._again(done, work)
        if work is not None:
            done, before = self._learn(done, work)
        elif done.place.wide:
            done = _after(done, self._context())
        self.append(done)
        return done, before

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
                self[i], _ = self._learn(self._again(done, before), before)
        return True

    def _again(self, done: Done, work: Work | None) -> Done:
        """What is over, told by how often it was before in this step."""
        place = done.place
        times = self._times[place] = self._times.get(place, -1) + 1
        if work is not None:
            place.note(done.ints, work)
        return place.child(("again", times)).end(done.ints)

    def _learn(self, done: Done, work: Work) -> tuple[Done, Work | None]:
        """A count is true of this; the other one that was held true until now, if there was one."""
        place, before, context, then = done.place, done.work, self._context(), done.context
        if len(context) <= _MOST_BEFORE:
            done.context = context
        if not place.wide and before is not None and before.flops != work.flops and then not in (None, context):
            place.tell_apart(wide=True)
            _after(done, then).place.learn(_after(done, then), before)
        if place.wide:
            place.note(done.ints, work)
            done = _after(done, context)
        return done, done.place.learn(done, work)

    def _context(self) -> tuple[Done, ...]:
        """All that came before in the step."""
        return tuple([other.plain or other for other in self])


def _after(done: Done, context: tuple[Done, ...]) -> Done:
    """What is over, told by all that came before it: a graph that lives on behind another's backward pass, say."""
    place = done.place.child(("after", number(repr([other.place.name for other in context]))))
    found = place.end((*(value for other in context for value in other.ints), *done.ints))
    found.plain = done
    return found
