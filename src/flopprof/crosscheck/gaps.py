"""The difference between a counter and ours, split by operator, each part with its exact amount."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flopprof.crosscheck import reasons
from flopprof.crosscheck.cells import Place, Sheet, family
from flopprof.crosscheck.reasons import Reason
from flopprof.crosscheck.result import Gap, Side
from flopprof.profile import OperatorRow

# Sums of rows that are tried, to tell whether a counter missed whole calls.
_MOST_SUMS = 4096


def gaps(counter: str, theirs: Sheet, ours: Mapping[Place, Sequence[OperatorRow]]) -> tuple[Gap, ...]:
    """Every operator that they count otherwise, the largest difference first; together they are the difference.

    Modules that differ by amounts that cancel each other in one operator differ in their names only: left out.
    """
    found: dict[tuple[str, Side, str], list[tuple[str, int, frozenset[int]]]] = {}
    for place in dict.fromkeys([*ours, *theirs.counts]):
        for operator, difference, reason in _at(counter, theirs, place, ours.get(place, ())):
            key = operator, place[1], reason.sentence
            found.setdefault(key, []).append((place[0], difference, reason.multiples))
    parts = []
    for (operator, side, sentence), places in found.items():
        flops = sum(difference for _module, difference, _multiples in places)
        multiples = [number for _module, _difference, numbers in places for number in numbers]
        if flops:
            parts.append(
                Gap(
                    operator=operator,
                    side=side,
                    flops=flops,
                    reason=sentence,
                    multiples=(min(multiples), max(multiples)) if multiples else None,
                    modules=tuple(module for module, _difference, _multiples in places),
                )
            )
    return tuple(sorted(parts, key=lambda gap: (-abs(gap.flops), gap.operator)))


def _at(counter: str, theirs: Sheet, place: Place, rows: Sequence[OperatorRow]) -> Iterator[tuple[str, int, Reason]]:
    """(operator, difference, reason) in one module and pass, family by family of operators."""
    counts = theirs.counts.get(place, {})
    if theirs.aligned and sum(counts.values()) == sum(row.flops for row in rows):
        return  # the same work, perhaps in other operators: fused here, in pieces there
    for kind in dict.fromkeys([*map(family, (row.op for row in rows)), *map(family, counts)]):
        mine = [row for row in rows if family(row.op) == kind]
        given = {operator: flops for operator, flops in counts.items() if family(operator) == kind}
        if sum(given.values()) == sum(row.flops for row in mine):
            continue
        if not theirs.aligned:
            yield _explained(counter, theirs, place, kind, given, mine)
            continue
        for operator in dict.fromkeys([*(row.op for row in mine), *given]):
            here = [row for row in mine if row.op == operator]
            one = {operator: given[operator]} if operator in given else {}
            if given.get(operator, 0) != sum(row.flops for row in here):
                yield _explained(counter, theirs, place, operator, one, here)


def _explained(
    counter: str, theirs: Sheet, place: Place, label: str, given: Mapping[str, int], rows: Sequence[OperatorRow]
) -> tuple[str, int, Reason]:
    said, counted = sum(given.values()), sum(row.flops for row in rows)
    difference = said - counted
    operator = " and ".join(sorted(given)) or label
    for sentence, flops in theirs.slips.get(place, {}).items():
        if flops == difference:
            return operator, difference, Reason(sentence)
    blind = _suspects(theirs.blind.get(place, {}), rows)
    if difference < 0 and blind and _is_part(said, rows):
        names = " or ".join(blind)
        return names, difference, Reason(f"no {names}")
    if not counted and family(operator) == "elementwise":
        return operator, difference, Reason(f"counts {operator}, which is elementwise and apart in flopprof")
    reason = reasons.find(counter, rows, difference)
    if not reason.sentence and counted and said and said % counted == 0:
        reason = Reason(f"counts {operator} too often", frozenset({said // counted}))
    return operator, difference, reason


def _suspects(blind: Mapping[str, int], rows: Sequence[OperatorRow]) -> list[str]:
    """Which of the operators that the counter has no formula for can have run these: the same, the like, or any."""
    names = {row.op for row in rows}
    kinds = {family(row.op) for row in rows}
    same = [operator for operator in blind if operator in names]
    like = [operator for operator in blind if family(operator) in kinds]
    return sorted(same or like or blind)


def _is_part(said: int, rows: Sequence[OperatorRow]) -> bool:
    """Is `said` the sum of some of these rows' calls, so that whole calls are missing?"""
    sums = {0}
    for row in rows:
        each = row.flops // row.calls
        sums = {part + calls * each for part in sums for calls in range(row.calls + 1)}
        if len(sums) > _MOST_SUMS:
            return said == 0
    return said in sums
