"""Experts that were multiplied and not chosen: a router picks a few, and the code multiplies them all for every token.

Told from what ran: the widths of the routers' choices, and how many rows met the experts' weights. No values are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flopprof.profile import Phase, Profile
from flopprof.rows import ExpertsRow

MERGED = " + "  # between the names of parameters that were multiplied as one
_PHASES: tuple[Phase, ...] = ("forward", "backward")


@dataclass
class Choices:
    """Choices of one router among so many experts, and the weights of these.

    slots    names and elements of the weights of all experts, one part of an expert each; a stack is one name
    rows     rows of scores, over all calls; picks: experts chosen, over all rows; calls: choices
    """

    fqn: str
    experts: int
    slots: tuple[Mapping[str, int], ...]
    rows: int = 0
    picks: int = 0
    calls: int = 0

    def add(self, rows: int, picks: int) -> None:
        """One more choice."""
        self.rows, self.picks, self.calls = self.rows + rows, self.picks + picks, self.calls + 1

    def renamed(self, old: str, new: str) -> Choices | None:
        """Those of a sibling that was folded into `old`; None where experts lie outside of it."""

        def name(fqn: str) -> str | None:
            return new + fqn[len(old) :] if fqn == old or fqn.startswith(f"{old}.") else None

        fqn, slots = name(self.fqn), []
        for slot in self.slots:
            slots.append({told: size for own, size in slot.items() if (told := name(own)) is not None})
            if len(slots[-1]) != len(slot):
                return None
        return None if fqn is None else replace(self, fqn=fqn, slots=tuple(slots))


def idle_experts(profile: Profile, choices: Iterable[Choices]) -> tuple[ExpertsRow, ...]:
    """Routers all of whose experts multiplied every token, though each chose fewer: a row for each phase that ran."""
    choices = list(choices)
    if not choices:
        return ()
    products: dict[Phase, list[tuple[frozenset[str], int]]] = {phase: [] for phase in _PHASES}
    for row in profile.operators:
        if row.parameter and row.phase in products:
            products[row.phase].append((frozenset(row.parameter.split(MERGED)), row.flops_full))
    calls = {row.fqn: row.calls for row in profile.modules}
    return tuple(row for each in choices for row in _rows(each, products, calls.get(each.fqn, 0)))


def _rows(
    made: Choices, products: Mapping[Phase, list[tuple[frozenset[str], int]]], calls: int
) -> Iterator[ExpertsRow]:
    forward = _of(made, products["forward"])
    chosen = _chosen(made, forward, calls)
    if chosen is None:
        return
    for phase in _PHASES:
        flops = sum(count for _names, count in _of(made, products[phase]))
        if flops and flops * chosen % made.experts == 0:
            yield ExpertsRow(
                fqn=made.fqn,
                experts=made.experts,
                chosen=chosen,
                phase=phase,
                flops=flops,
                active_flops=flops * chosen // made.experts,
            )


def _of(made: Choices, products: Iterable[tuple[frozenset[str], int]]) -> list[tuple[frozenset[str], int]]:
    """The products with weights of these experts alone."""
    weights = frozenset(name for slot in made.slots for name in slot)
    return [(names, flops) for names, flops in products if names <= weights and flops]


def _chosen(made: Choices, forward: list[tuple[frozenset[str], int]], calls: int) -> int | None:
    """How many experts each token chose, where every one of its rows met all experts; None where it did not.

    With n elements in all experts together, rows that met every one of them took 2 n FLOPs each; those that met k of E
    took 2 n k / E on average, which makes fewer rows than the router saw.
    """
    used = frozenset(name for names, _flops in forward for name in names)
    elements = sum(sum(slot.values()) for slot in made.slots if not used.isdisjoint(slot))
    flops = sum(count for _names, count in forward)
    if not elements or flops % (2 * elements):
        return None
    rows = flops // (2 * elements)
    if not rows or made.rows % rows or made.picks % rows:
        return None
    turns = made.rows // rows  # a router may choose one expert, then another
    if turns > 1 and made.calls != turns * calls:
        return None
    chosen = made.picks // rows
    return chosen if chosen < made.experts else None
