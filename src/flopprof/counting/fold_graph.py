"""What the autograd graph says of folded calls: gradients reach them, and leave them, just as their template.

The engine runs nodes in the descending order of their numbers, and the numbers of a call's nodes are an interval. So
the graph, read before the backward pass, tells everything: which outputs of a block get a gradient, which inputs give
one, whether that gradient is the first to arrive (later ones are added, which is counted), and whether any edge
crosses a block's boundary that is not one of its inputs, outputs or parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flopprof.counting.fold_call import Call

Edge = tuple[Any, int]  # a node and the number of its output
_LEAF = 1 << 62  # nodes that accumulate into leaves carry the largest numbers there are
_ROOT = (1 << 63) - 1


def edge_of(tensor: torch.Tensor) -> Edge:
    """Where the gradient of a tensor that wants one goes."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    with torch._C._DisableTorchDispatch(), torch.enable_grad():
        return tensor.view_as(tensor).grad_fn.next_functions[0]  # type: ignore[union-attr]  # a leaf's accumulator


class Graph:
    """Every edge that a backward pass from `outputs` runs along, by where it ends."""

    def __init__(self, outputs: list[torch.Tensor], intervals: list[tuple[int, int, Call]]) -> None:
        self._starts, self._homes = _segments(intervals)
        self.consumers: defaultdict[Edge, list[int]] = defaultdict(list)
        self.crossings: list[tuple[frozenset[Call], frozenset[Call], Edge]] = []
        self.leaves: list[tuple[frozenset[Call], torch.Tensor | None, Edge]] = []
        self._walk([edge_of(output) for output in outputs])

    def home(self, sequence: int) -> frozenset[Call]:
        """The calls, one within the other, that made the node of this number."""
        return self._homes[bisect_right(self._starts, sequence) - 1] if sequence < _LEAF else frozenset()

    def _walk(self, roots: list[Edge]) -> None:
        for edge in roots:
            self.consumers[edge].append(_ROOT)
        seen = {node for node, _number in roots}
        stack = list(seen)
        consumers, home = self.consumers, self.home
        while stack:
            node = stack.pop()
            sequence = node._sequence_nr()
            here = home(sequence)
            for edge in node.next_functions:
                following = edge[0]
                if following is None:
                    continue
                consumers[edge].append(sequence)
                end = following._sequence_nr()
                if end >= _LEAF:
                    self.leaves.append((here, getattr(following, "variable", None), edge))
                else:
                    there = home(end)
                    if there is not here:
                        self.crossings.append((here, there, edge))
                if following not in seen:
                    seen.add(following)
                    stack.append(following)

    def first_after(self, edge: Edge, call: Call) -> bool:
        """Does a gradient arrive at this edge before those that the call's own nodes make?"""
        return any(sequence >= call.end for sequence in self.consumers.get(edge, ()))

    def within(self, edge: Edge, call: Call) -> bool:
        """Do the call's own nodes make a gradient for this edge?"""
        return any(call.start <= sequence < call.end for sequence in self.consumers.get(edge, ()))


def _segments(intervals: list[tuple[int, int, Call]]) -> tuple[list[int], list[frozenset[Call]]]:
    """The number line cut at every start and end; for each piece, the calls that cover it."""
    cuts = sorted({cut for start, end, _call in intervals for cut in (start, end)})
    events: defaultdict[int, list[tuple[bool, Call]]] = defaultdict(list)
    for start, end, call in intervals:
        if start < end:
            events[start].append((True, call))
            events[end].append((False, call))
    starts, homes, running = [-1], [frozenset[Any]()], set[Any]()
    for cut in cuts:
        for begins, call in events[cut]:
            (running.add if begins else running.discard)(call)
        starts.append(cut)
        homes.append(frozenset(running))
    return starts, homes


def unfit(outputs: list[torch.Tensor], start: int, own: type) -> str:
    """What in a call's own part of the graph cannot stand for a sibling's; empty where nothing."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not isinstance(node, own):
            return "an autograd.Function of its own"
        for following, _number in node.next_functions:
            if following is not None and following not in seen and start <= following._sequence_nr() < _LEAF:
                seen.add(following)
                stack.append(following)
    return ""
