"""The floats that a model is given: they tell its calls apart for as long as they may matter.

A float may say how much is multiplied (the share of rows that is kept); one that changes in every step (a temperature,
a learning rate) hardly does. Each value is a call of its own, and counted, until the counts of more than sixteen values
are found to be equal: then other values are taken to be like them. One that is further from them than they are from
each other is counted, too, which a steady change makes rare. Where two counts differ, values are told apart for good.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flopprof.meter.places import Place
from flopprof.meter.signature import Structure

_MOST = 16
_ANY = "any float"  # in a structure, in the place of a value; with a space, as no text that is kept there has

Known = Mapping[Any, Place]  # the places of the calls so far, by structure


class Floats:
    """Which of them matter, as far as one meter's counts say."""

    def __init__(self) -> None:
        self._matter: set[Structure] = set()  # with some values left out, the counts differed
        self._spans: dict[Structure, list[tuple[float, float]]] = {}  # of each value that is left out
        self._doubts: dict[Structure, Structure] = {}  # what is counted to see whether it is like the others
        self._late = False

    def told(self, structure: Structure, known: Known) -> Structure:
        """The structure, without those values that do not matter."""
        if structure in known:
            return structure
        at = [i for i, part in enumerate(structure) if type(part) is float]
        for left_out in [at, *([i] for i in at if len(at) > 1)] if at else []:
            loose = _without(structure, left_out)
            if loose not in self._matter and (
                self._covers(loose, structure, left_out, known)
                if loose in known
                else self._equal(loose, left_out, known) > _MOST
            ):
                return self.told(loose, known)
        return structure

    def _covers(self, loose: Structure, structure: Structure, left_out: Collection[int], known: Known) -> bool:
        """Are these values no further from those that were counted than these are from each other?"""
        doubt = self._doubts.get(loose)
        counted = doubt is not None and doubt in known and known[doubt].known
        if counted or loose not in self._spans:
            self._doubts.pop(loose, None)
            self._equal(loose, left_out, known)
            if loose in self._matter:
                self._late = True
                return False
            like = [other for other in known if other != loose and _without(other, left_out) == loose]
            self._spans[loose] = [(min(other[i] for other in like), max(other[i] for other in like)) for i in left_out]
        near = all(
            2 * low - high <= structure[i] <= 2 * high - low
            for i, (low, high) in zip(left_out, self._spans[loose], strict=True)
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
        return len(compared)

    def notes(self, *known: Known) -> Iterator[str]:
        """What a reader of the figures must know."""
        left_out = {structure for places in known for structure in places if _ANY in structure}
        if left_out - self._matter:
            yield (
                f"floats that the models are given do not all tell steps apart: more than {_MOST} values multiplied "
                "the same. recount_every= shows if others do."
            )
        if self._matter:
            late = " Some steps before that was found may have been taken for others." if self._late else ""
            yield (
                "a float that the models are given changes what they multiply: steps of each new value of it are "
                f"counted, and in no figure.{late}"
            )


def _without(structure: Structure, left_out: Collection[int]) -> Structure:
    return tuple(_ANY if i in left_out and type(part) is float else part for i, part in enumerate(structure))


def _counts(place: Place) -> Iterator[tuple[Any, Any]]:
    """Everything counted from this place on: (events and integers, numbers)."""
    waiting: list[tuple[Structure, Place]] = [((), place)]
    while waiting:
        events, here = waiting.pop()
        for ints, work in here.known.items():
            yield (events, ints), work.numbers()
        waiting += (((*events, event), child) for event, child in here.children.items())
