"""Profile -> tree of modules, in which identical repeated siblings are one node."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from flopprof.profile import PHASES, Profile, ancestors


@dataclass(frozen=True)
class Node:
    """One module, or `repeats` identical ones; every number is of all of them together.

    name is relative to the parent node; fqn is that of the (first) module. flops and own are in the order of PHASES:
    with and without children. uncounted tells per phase whether something below has no formula, so that the number
    is a lower bound.
    """

    name: str
    cls: str
    calls: int
    parameters: int
    output_shape: tuple[int, ...] | None
    flops: tuple[int, ...]
    own: tuple[int, ...]
    uncounted: tuple[bool, ...]
    children: tuple[Node, ...] = ()
    repeats: int = 1
    fqn: str = field(default="", compare=False)

    @property
    def total(self) -> int:
        """FLOPs of all phases."""
        return sum(self.flops)


def module_tree(profile: Profile) -> Node:
    """The root of the modules that ran, repeated siblings folded.

    A container that never runs itself (ModuleList) is no node: its children carry its name, `layers.0`.
    """
    rows = {row.fqn: row for row in profile.modules}
    total = [profile.by_module(phase) for phase in PHASES]
    own = [profile.by_module(phase, own=True) for phase in PHASES]
    holes = [
        {name for row in profile.uncounted_rows if row.phase == phase for name in ancestors(row.fqn)}
        for phase in PHASES
    ]
    below: dict[str, dict[str, None]] = {}
    for fqn in dict.fromkeys([*rows, *(name for table in total for name in table), *(n for h in holes for n in h)]):
        for child, parent in pairwise(ancestors(fqn)):
            below.setdefault(parent, {})[child] = None

    def node(fqn: str, name: str) -> Node:
        children = tuple(fold(nodes_below(fqn, "")))
        row = rows.get(fqn)
        return Node(
            name=name,
            cls=row.cls if row else "",
            calls=row.calls if row else 0,
            parameters=row.parameters if row else sum(child.parameters for child in children),
            output_shape=row.output_shape if row else None,
            flops=tuple(table.get(fqn, 0) for table in total),
            own=tuple(table.get(fqn, 0) for table in own),
            uncounted=tuple(fqn in hole for hole in holes),
            children=children,
            fqn=fqn,
        )

    def nodes_below(parent: str, prefix: str) -> Iterator[Node]:
        for fqn in below.get(parent, ()):
            name = prefix + fqn.rpartition(".")[2]
            idle = fqn not in rows or rows[fqn].calls == 0
            if idle and below.get(fqn) and not any(table.get(fqn) for table in own):
                yield from nodes_below(fqn, f"{name}.")
            else:
                yield node(fqn, name)

    return node("", "")


def fold(siblings: Iterable[Node]) -> Iterator[Node]:
    """Siblings with consecutive numbers in their names and equal subtrees become one: `layers.0..31`."""
    run: list[Node] = []
    for sibling in siblings:
        if run and not (_follows(run[-1].name, sibling.name) and replace(sibling, name=run[0].name) == run[0]):
            yield _merged(run)
            run = []
        run.append(sibling)
    if run:
        yield _merged(run)


def _follows(name: str, later: str) -> bool:
    (stem, number), (later_stem, later_number) = _numbered(name), _numbered(later)
    return number is not None and stem == later_stem and later_number == number + 1


def _numbered(name: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.*?)([0-9]+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def _merged(run: list[Node]) -> Node:
    if len(run) == 1:
        return run[0]
    last = _numbered(run[-1].name)[1]
    return replace(_times(run[0], len(run)), name=f"{run[0].name}..{last}", repeats=len(run))


def _times(node: Node, factor: int) -> Node:
    return replace(
        node,
        calls=node.calls * factor,
        parameters=node.parameters * factor,
        flops=tuple(flops * factor for flops in node.flops),
        own=tuple(flops * factor for flops in node.own),
        children=tuple(_times(child, factor) for child in node.children),
    )
