"""Counts by module, pass and operator: the form in which two counters are compared."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from flopprof.crosscheck.result import Side
from flopprof.formulas import RULES, SEEN_THROUGH
from flopprof.profile import OperatorRow, Profile

Place = tuple[str, Side]  # module, pass


@dataclass
class Sheet:
    """What a counter says of each place.

    counts: FLOPs by operator. blind: operators that it was given there, that multiply, and that it has no formula for.
    slips: FLOPs that it is known to give too many there, by the reason.
    aligned: its operators are those that torch's dispatcher runs, so that equal names can be compared.
    """

    aligned: bool = True
    counts: dict[Place, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    blind: dict[Place, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))

    slips: dict[Place, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))

    def total(self) -> int:
        """All FLOPs."""
        return sum(sum(operators.values()) for operators in self.counts.values())


def rows_by_place(profile: Profile, *, backward: bool, recompute: bool) -> dict[Place, list[OperatorRow]]:
    """A profile's rows; with the backward pass or without, what is computed again in it or left out."""
    places: dict[Place, list[OperatorRow]] = {}
    for row in profile.operators:
        if row.phase == "forward":
            places.setdefault((row.fqn, "forward"), []).append(row)
        elif backward and (row.phase == "backward" or (recompute and row.phase == "recompute")):
            places.setdefault((row.fqn, "backward"), []).append(row)
    order = {row.fqn: i for i, row in enumerate(profile.modules)}
    return dict(sorted(places.items(), key=lambda item: (item[0][1] == "backward", order.get(item[0][0], 0))))


def sheet_of(profile: Profile, *, backward: bool) -> Sheet:
    """A profile's model FLOPs as a sheet."""
    sheet = Sheet()
    for place, rows in rows_by_place(profile, backward=backward, recompute=False).items():
        for row in rows:
            sheet.counts[place][row.op] += row.flops
    return sheet


def family(operator: str) -> str:
    """The kind of work an operator does, under whatever name a counter knows it."""
    name = operator.rpartition("::")[2]
    if "attention" in name or "sdpa" in name:
        return "attention"
    if "conv" in name:
        return "convolution"
    if any(word in name for word in ("lstm", "gru", "rnn")):
        return "recurrence"
    return "product" if multiplies(operator) else "elementwise"


def multiplies(operator: str) -> bool:
    """Has flopprof a formula for it, or looks inside for operators that have one?"""
    name = operator if "::" in operator else f"aten::{operator}"
    return name in RULES or name in SEEN_THROUGH
