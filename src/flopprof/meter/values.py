"""The floats and texts that a model is given: they tell its calls apart for as long as they may matter.

A float may say how much is multiplied (the share of rows that is kept), a text what is done (a task); one that changes
in every step (a temperature, the name of a file) hardly does. Each value is a call of its own, and counted, until the
counts of more than sixteen values are found to be equal: then other values are taken to be like them; of a choice of a
few beside others, those values that were seen. A float that is further from them than they are from each other is
counted, too, which a steady change makes rare. Where two counts differ, values are told apart for good.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flopprof.meter.arguments import OF_THESE, TEXT, Structure
from flopprof.meter.fitting import are_one
from flopprof.meter.places import Place

_MOST = 16
# Of no more than these, each is tried alone as the one that matters.
_MOST_CHOICES = 12
# In a structure, in the place of a value; with a space, as no text that is kept there has.
_ANY: dict[type, str] = {float: "any float", str: "any text"}
_NAMES = {"floats": _ANY[float], "texts": _ANY[str]}

Known = Mapping[Any, Place]  # the places of the calls so far, by structure


class Values:
    """Which of them matter, as far as one meter's counts say."""

    def __init__(self) -> None:
        self._matter: set[Structure] = set()  # with some values left out, the counts differed
        self._spans: dict[Structure, dict[int, tuple[float, float]]] = {}  # of each float that is left out
        self._doubts: dict[Structure, Structure] = {}  # what is counted to see whether it is like the others
        self._seen: dict[Structure, defaultdict[int, set[Any]]] = {}  # a few at each place, by all else
        self._apart: set[Structure] = set()  # of these a new value was counted for that
        self._late = False

    def told(self, structure: Structure, known: Known) -> Structure:
        """The structure, without those values that do not matter."""
        if structure in known:
            return structure
        mattered: set[Structure] = set()
        at = _values(structure)
        many, new = self._many(structure, at, known)
        for left_out in _tries(structure, many, at):
            loose = _without(structure, left_out)
            strange = new and not {*left_out} <= {*many}
            if loose in self._matter:
                mattered |= {loose} if {*left_out} <= {*many} else set()
            elif (
                self._covers(loose, structure, left_out, known, strange=strange)
                if loose in known
                else not strange and self._equal(loose, left_out, known) > _MOST
            ):
                return self.told(loose, known)
        self._apart |= mattered
        return structure

    def _many(self, structure: Structure, at: list[int], known: Known) -> tuple[list[int], bool]:
        """Where more than a few values were seen in structures like this one; elsewhere, is one a new one?"""
        rest = _without(structure, at)
        if at and rest not in self._seen:
            seen = self._seen[rest] = defaultdict(set)
            for other in known:
                if len(other) == len(rest) and _without(other, _values(other)) == rest:
                    for i in at:
                        seen[i].add(other[i])
        whole = [i for i in at if _whole(structure, i) == i]
        unseen = [i for i in whole if structure[i] not in self._seen[rest][i]]
        free = [i for i in whole if self._is_free(self._seen[rest][i], structure[i])]
        return [i for i in at if _whole(structure, i) in free], not {*unseen} <= {*free}

    @staticmethod
    def _is_free(seen: set[Any], value: Any) -> bool:
        """With that value, are they more than a few? Or is any known to be like the others: by a resumed meter, say."""
        if len(seen) <= _MOST:
            seen.add(value)
        return len(seen) > _MOST or _ANY[type(value)] in seen

    def _covers(
        self, loose: Structure, structure: Structure, left_out: Collection[int], known: Known, *, strange: bool
    ) -> bool:
        """Are these floats no further from those that were counted than these are from each other?

        strange: a choice among these values is another one than all those before.
        """
        left = [i for i in left_out if type(structure[i]) is float]
        doubt = self._doubts.get(loose)
        counted = doubt is not None and doubt in known and known[doubt].known
        if counted or loose not in self._spans:
            self._doubts.pop(loose, None)
            self._equal(loose, left_out, known)
            if loose in self._matter:
                self._late = True
                return False
            self._spans[loose] = dict(_spans(loose, known))
        spans = self._spans[loose]
        near = not strange and all(
            2 * low - high <= structure[i] <= 2 * high - low for i, (low, high) in spans.items() if i in left
        )
        if not near:
            self._doubts[loose] = structure
        return near

    def _equal(self, loose: Structure, left_out: Collection[int], known: Known) -> int:
        """So many values multiplied the same, of those whose counts can be compared; 0 where two of them differ."""
        like = [place for structure, place in known.items() if _without(structure, left_out) == loose]
        if len(like) <= _MOST:
            return 0
        counts: dict[Any, dict[int, Any]] = {}
        for number, place in enumerate(like):
            for where, numbers in _counts(place):
                counts.setdefault(where, {})[number] = numbers
        compared: set[int] = set()
        for found in counts.values():
            first, *others = found.values()
            if any(other != first for other in others):
                self._matter.add(loose)
                return 0
            if others:
                compared |= found.keys()
        return len(compared) if len(compared) > _MOST else self._on_one_form(counts)

    @staticmethod
    def _on_one_form(counts: Mapping[Any, Mapping[int, Any]]) -> int:
        """So many counts, of sizes that hardly come twice, are told by one form at each place; not tried each time."""
        forms: defaultdict[Any, dict[Any, Any]] = defaultdict(dict)
        for (events, ints), found in counts.items():
            forms[events][ints] = next(iter(found.values()))
        fewest = min(map(len, forms.values()), default=0)
        if fewest <= _MOST or fewest & (fewest - 1):
            return 0
        return fewest if all(are_one(points) for points in forms.values()) else 0

    def notes(self, *known: Known) -> Iterator[str]:
        """What a reader of the figures must know."""
        left_out = {structure for places in known for structure in places if _kinds(structure)} - self._matter
        if left_out:
            yield (
                f"{_kinds(*left_out)} that the models are given do not all tell steps apart: more than {_MOST} values "
                "multiplied the same. recount_every= shows if others do."
            )
        if self._apart:
            late = " Some steps before that was found may have been taken for others." if self._late else ""
            yield (
                f"{_kinds(*self._apart)} that the models are given change what they multiply: steps of each new "
                f"value are counted, and in no figure.{late}"
            )


def _tries(structure: Structure, many: list[int], at: list[int]) -> Iterator[list[int]]:
    """Values to leave out together: all that are no choice of a few; without one, one kind, one; all; without one."""
    floats = [i for i in many if type(structure[i]) is float]
    texts = [i for i in many if type(structure[i]) is str]
    without_one = [[i for i in many if i != left] for left in floats]
    tries = [many, *without_one, texts, floats, *([i] for i in floats), at]
    if len(at) <= _MOST_CHOICES:
        tries += [[i for i in at if i != left] for left in at]
    yield from (left_out for i, left_out in enumerate(tries) if left_out and left_out not in tries[:i])


def _spans(loose: Structure, known: Known) -> Iterator[tuple[int, tuple[float, float]]]:
    """The least and the greatest that was counted of each float that is left out."""
    left_out = [i for i, part in enumerate(loose) if part in _NAMES.values()]
    like = [other for other in known if other != loose and _without(other, left_out) == loose]
    for i in left_out:
        floats = [other[i] for other in like if type(other[i]) is float]
        if floats:
            yield i, (min(floats), max(floats))


def _kinds(*structures: Structure) -> str:
    """What is left out in these."""
    return " or ".join(name for name, any_ in _NAMES.items() if any(any_ in structure for structure in structures))


def _values(structure: Structure) -> list[int]:
    """Where its floats and texts are."""
    return [
        i
        for i, part in enumerate(structure)
        if type(part) is float or (i and structure[i - 1] == TEXT and part != _ANY[str])
    ]


def _whole(structure: Structure, at: int) -> int:
    """Where the value is that says all of a sequence, of whose floats the least and the greatest are told beside."""
    while structure[at - 1] == OF_THESE:
        at -= 2
    return at


def _without(structure: Structure, left_out: Collection[int]) -> Structure:
    left = {*left_out}
    return tuple(
        _ANY.get(type(part), part) if i in left and part not in _NAMES.values() else part
        for i, part in enumerate(structure)
    )


def _counts(place: Place) -> Iterator[tuple[Any, Any]]:
    """Everything counted from this place on: (events and integers, numbers)."""
    waiting: list[tuple[Structure, Place]] = [((), place)]
    while waiting:
        events, here = waiting.pop()
        for ints, work in here.known.items():
            yield (events, ints), work.numbers()
        waiting += (((*events, event), child) for event, child in here.children.items())
