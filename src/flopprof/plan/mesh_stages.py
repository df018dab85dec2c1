"""The stages of a pipeline: which blocks of a model lie on which, and what passes between them. Imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from flopprof.errors import UsageError
from flopprof.profile import Profile


@dataclass(frozen=True)
class Blocks:
    """The list of blocks that is cut into stages, and the spans (first, last) of each."""

    fqn: str
    spans: tuple[tuple[int, int], ...]
    before: frozenset[str]
    element: int

    def stage_of(self, name: str) -> int:
        """The stage of a module or parameter: that of its block, or an end."""
        inside = re.match(rf"{re.escape(self.fqn)}\.(\d+)(?:\.|$)", name) if self.fqn else None
        if inside is not None:
            return next(i for i, (first, last) in enumerate(self.spans) if first <= int(inside[1]) <= last)
        return 0 if any(name == part or name.startswith(f"{part}.") for part in self.before) else len(self.spans) - 1

    def tied_again(self, model: nn.Module, index: int) -> set[str]:
        """Parameters that the last stage holds a copy of, being shared with the first."""
        if len(self.spans) == 1 or index != len(self.spans) - 1:
            return set()
        first = {id(p): name for name, p in model.named_parameters()}
        return {
            first[id(parameter)]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if self.stage_of(name) == index != self.stage_of(first[id(parameter)])
        }

    def boundary(self, profile: Profile, index: int) -> int:
        """Bytes to the next stage in forward, and to the one before in backward: what passes between two blocks."""
        if len(self.spans) == 1:
            return 0
        edges = [last for _, last in self.spans[:-1]]
        sides = [edge for at, edge in enumerate(edges) if at in (index, index - 1)]
        shapes = {row.fqn: row.output_shape for row in profile.modules}
        return sum(numel(shapes[f"{self.fqn}.{edge}"]) * self.element for edge in sides)


def cut(model: nn.Module, profile: Profile, pp: int) -> Blocks:
    """The list of modules with the most FLOPs, cut evenly, earlier stages one longer. Raises UsageError."""
    totals = profile.by_module()
    lists = [
        (fqn, module) for fqn, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    lists = [(fqn, module) for fqn, module in lists if fqn and len(module) >= pp]
    found = {fqn: sum(totals.get(f"{fqn}.{i}", 0) for i in range(len(module))) for fqn, module in lists}
    parameter = next(model.parameters(), None)
    element = 4 if parameter is None else parameter.element_size()
    if pp == 1 and not found:
        return Blocks("", ((0, 0),), frozenset(), element)
    if not found:
        raise UsageError(f"{type(model).__name__} has no list of {pp} blocks or more to cut into stages: give pp=1.")
    fqn = max(found, key=found.__getitem__)
    count = len(dict(lists)[fqn])
    spans, start = [], 0
    for stage in range(pp):
        length = count // pp + (stage < count % pp)
        spans.append((start, start + length - 1))
        start += length
    names = [name for name, _ in model.named_modules() if name]
    above = {fqn[: at.start()] for at in re.finditer(r"\.", fqn)}
    before = frozenset(name for name in names[: names.index(fqn)] if name not in above)
    return Blocks(fqn, tuple(spans), before, element)


def numel(shape: Iterable[int] | None) -> int:
    """Elements of a tensor of that shape; 0 where there is none."""
    count = 1
    for size in shape or (0,):
        count *= size
    return count
