"""Which module is running, and which module's forward made this autograd node?

A Frame is a place that FLOPs are charged to: a module under one name, or a region. Names come from the
registered module tree. Timeline answers for backward: autograd numbers its nodes in the order of creation,
so noting the running frame with that number at each module's enter and exit gives, for any node, the frame
that was running when its forward operator ran.
"""

from __future__ import annotations

import weakref
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from flopprof.counting.operands import Sources
from flopprof.counting.parameters import unique_parameters
from flopprof.profile import ParameterRow

_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
_WRAPPED_ATTRIBUTES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# A loop that never runs backward over its graphs (evaluation without no_grad) must not grow for ever.
_MOST_NOTES = 1 << 20
_MOST_SITES = 1 << 17
_TIDY_AT = 1 << 10
# How many finished backward passes keep their notes: two losses may share a forward without retain_graph.
_KEPT_PASSES = 8


class Frame:
    """A module under one name (or a region): what FLOPs are charged to."""

    __slots__ = ("calls", "children", "cls", "fqn", "line", "module", "output_shape", "parameters", "seen", "visible")

    def __init__(self, fqn: str, cls: str, module: torch.nn.Module | None = None) -> None:
        self.fqn = fqn
        self.cls = cls
        self.module = None if module is None else weakref.ref(module)
        self.children: dict[Any, Frame] = {}
        self.visible: tuple[int, int] | None = None  # of the pairs here (second), a causal mask shows so many (first)
        self.line = ""  # of source, where lines are told apart
        self.calls = 0
        self.output_shape: tuple[int, ...] | None = None
        self.parameters: tuple[int, int] | None = None  # (with children, own), once measured
        self.seen: tuple[ParameterRow, ...] = ()  # with children, of one that nobody may hold when it is measured

    def own(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that the module has itself now, by their whole names."""
        module = self.module() if self.module is not None else None
        prefix = f"{self.fqn}." if self.fqn else ""
        held = module._parameters.items() if module is not None else ()
        return [(prefix + name, parameter) for name, parameter in held if parameter is not None]

    def at(self, line: str) -> Frame:
        """The same place while this line of source runs."""
        frame = self.children.get(line)
        if frame is None:
            frame = self.children[line] = Frame(self.fqn, self.cls)
            frame.line, frame.visible = line, self.visible
        return frame

    def __repr__(self) -> str:
        return f"Frame({self.fqn!r}, {self.cls})"


class Names:
    """fqns for modules: those of the model's own tree, and invented ones for modules outside it."""

    def __init__(self, model: torch.nn.Module | None, sources: Sources) -> None:
        self._sources = sources
        self.root = Frame("", type(model).__name__ if model is not None else "")
        self.frames: dict[str, Frame] = {"": self.root}
        self._fqns: dict[int, tuple[weakref.ref[torch.nn.Module], list[str]]] = {}  # by id(module)
        self._taken: dict[str, int] = {}
        if model is not None:
            self.root.module = weakref.ref(unwrap(model))
            self.root.cls = type(unwrap(model)).__name__
            self._register(model, "")

    def enter(self, parent: Frame, module: torch.nn.Module) -> Frame:
        """The frame of `module` called while `parent` runs."""
        frame = parent.children.get(id(module))
        if frame is not None and (frame is parent or (frame.module is not None and frame.module() is module)):
            return frame
        frame = self._resolve(parent, module)
        parent.children[id(module)] = frame
        return frame

    def region(self, parent: Frame, name: str) -> Frame:
        """The frame of code named by the user, under the running module."""
        return self._frame(f"{parent.fqn}.{name}" if parent.fqn else name, "region", None)

    def masked(self, parent: Frame, visible: tuple[int, int]) -> Frame:
        """The running module's frame while it computes causal attention with so many (visible, all) pairs."""
        frame = parent.children.get(visible)
        if frame is None:
            frame = parent.children[visible] = Frame(parent.fqn, parent.cls)
            frame.visible = visible
        return frame

    def _resolve(self, parent: Frame, module: torch.nn.Module) -> Frame:
        fqns = self._known(module)
        adopted = not fqns
        if adopted:
            fqns = self._adopt(parent, module)
            if not fqns:
                return parent
        frame = self._frame(_nearest(fqns, parent.fqn), type(module).__name__, module)
        if adopted:
            frame.seen = unique_parameters(walk(module, frame.fqn))
        return frame

    def _adopt(self, parent: Frame, module: torch.nn.Module) -> list[str]:
        owner = parent.module() if parent.module is not None else None
        for key, child in owner._modules.items() if owner is not None else ():
            if child is module:
                self._register(module, f"{parent.fqn}.{key}" if parent.fqn else key)
                return self._known(module)
        if is_wrapper(module):
            return []
        cls = type(module).__name__
        base = f"{parent.fqn}.{cls}" if parent.fqn else cls
        number = self._taken.get(base, 0) + 1
        self._taken[base] = number
        self._register(module, base if number == 1 else f"{base}#{number}")
        return self._known(module)

    def _known(self, module: torch.nn.Module) -> list[str]:
        entry = self._fqns.get(id(module))
        return entry[1] if entry is not None and entry[0]() is module else []

    def _register(self, module: torch.nn.Module, fqn: str) -> None:
        submodules = list(walk(module, fqn))
        self._sources.add_module(submodules)
        for name, submodule in submodules:
            known = self._known(submodule)
            if not known:
                self._fqns[id(submodule)] = (weakref.ref(submodule), [name])
            elif name not in known:
                known.append(name)

    def _frame(self, fqn: str, cls: str, module: torch.nn.Module | None) -> Frame:
        frame = self.frames.get(fqn)
        if frame is None:
            frame = self.frames[fqn] = Frame(fqn, cls, module)
        elif module is not None and (frame.module is None or frame.module() is None):
            frame.module, frame.cls = weakref.ref(module), cls
        return frame


def is_wrapper(module: torch.nn.Module) -> bool:
    """Does this module only wrap another (DDP, a compiled model), so that it has no name of its own?"""
    children = module._modules  # most modules have none
    return bool(children) and (
        type(module).__name__ in _WRAPPERS or not _WRAPPED_ATTRIBUTES.isdisjoint(children.keys())
    )


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DDP, DataParallel or torch.compile wrappers."""
    while is_wrapper(module):
        module = next(child for child in module._modules.values() if child is not None)
    return module


def walk(module: torch.nn.Module, fqn: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Every (fqn, module) below, shared ones under each name, cycles cut; wrapper prefixes dropped."""
    stack: list[tuple[str, torch.nn.Module, frozenset[int]]] = [(fqn, module, frozenset())]
    while stack:
        name, current, above = stack.pop()
        yield name, current
        children = current._modules
        if not children:
            continue
        inside = above | {id(current)}
        wrapper = is_wrapper(current)
        for key, child in reversed(children.items()):
            if child is not None and id(child) not in inside:
                stack.append((name if wrapper else f"{name}.{key}" if name else key, child, inside))


def _nearest(fqns: list[str], parent: str) -> str:
    """The name under the nearest running parent; the first registered one where none is."""
    if len(fqns) == 1:
        return fqns[0]
    while parent:
        for name in fqns:
            if name == parent or name.startswith(f"{parent}."):
                return name
        parent = parent.rpartition(".")[0]
    return fqns[0]


class Timeline:
    """Frames and counted calls over autograd sequence numbers: `owner(n)` ran when node n was made.

    A graph that is gone needs no notes. What a backward pass freed is forgotten once the table has doubled, the
    latest passes excepted; of graphs that no backward ran over, the oldest notes go when there are too many.
    """

    def __init__(self, root: Frame) -> None:
        self._root = root
        self._starts = array("q", [-1])
        self._owners: list[Frame] = [root]
        self._sites: dict[int, Any] = {}
        self._lines: dict[int, str] = {}
        self._latest: deque[set[int]] = deque()
        self._freed: set[int] = set()
        self._tidy_at = _TIDY_AT
        self.last = -1

    def note(self, sequence: int, frame: Frame) -> None:
        """From node number `sequence` on, `frame` is running."""
        if self._starts[-1] >= sequence:
            self._owners[-1] = frame
        else:
            self._starts.append(sequence)
            self._owners.append(frame)
            if len(self._starts) > _MOST_NOTES:
                # The oldest half belongs to the root from now on.
                half = len(self._starts) // 2
                del self._starts[1:half], self._owners[1:half]

    def owner(self, sequence: int) -> tuple[int, Frame]:
        """The frame that was running when node number `sequence` was made, and the number from which it ran."""
        index = bisect_right(self._starts, sequence) - 1
        return self._starts[index], self._owners[index]

    def remember(self, sequence: int, row: Any) -> None:
        """Node number `sequence` was made by a call of this row: its backward will want to know.

        Of several counted operators inside one node, all rows are joined to the first.
        """
        first = self._sites.setdefault(sequence, row)
        if first is not row and row.joint is None:
            row.joint = first
        if len(self._sites) > _MOST_SITES:
            for old in list(self._sites)[: _MOST_SITES // 2]:
                del self._sites[old]

    def remember_line(self, sequence: int, line: str, *, first: bool) -> None:
        """The forward operator of node number `sequence` was called on this line; `first`: unless one is known."""
        if not first or sequence not in self._lines:
            self._lines[sequence] = line
        if len(self._lines) > _MOST_SITES:
            for old in list(self._lines)[: _MOST_SITES // 2]:
                del self._lines[old]

    def line(self, sequence: int) -> str:
        """The line that called the forward operator of node number `sequence`, empty where it is not known."""
        return self._lines.get(sequence, "")

    def made_by(self, sequence: int) -> Any:
        """The row whose call made node number `sequence`; None where it is not known."""
        return self._sites.get(sequence)

    def freed(self, intervals: set[int], sites: list[int]) -> None:
        """A backward pass ran over nodes of these intervals, and over these sites, and freed them."""
        for sequence in sites:
            self._sites.pop(sequence, None)
            self._lines.pop(sequence, None)
        self._latest.append(intervals)
        if len(self._latest) > _KEPT_PASSES:
            self._freed |= self._latest.popleft()
        if len(self._starts) + len(self._freed) > self._tidy_at:
            self._tidy()

    def behind(self, sequence: int) -> bool:
        """Has this thread's numbering begun anew? Then what is noted here was another thread's."""
        return sequence < self._starts[-1]

    def _tidy(self) -> None:
        starts, owners = array("q", [-1]), [self._root]
        for start, owner in zip(self._starts, self._owners, strict=True):
            kept = self._root if start in self._freed else owner
            if kept is not owners[-1]:
                starts.append(start)
                owners.append(kept)
        self._starts, self._owners = starts, owners
        self._freed.clear()
        self._tidy_at = max(_TIDY_AT, 2 * len(starts))

    def __len__(self) -> int:
        return len(self._starts) + len(self._sites) + len(self._lines) + len(self._freed)
