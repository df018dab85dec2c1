"""Which module and which phase is running now: the state that a counter's hooks keep up to date."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from flopprof.counting.attribution import Frame, Names, Timeline
from flopprof.profile import Phase

_node = torch._C._current_autograd_node
_sequence = torch._C._autograd._get_sequence_nr
_grad_enabled = torch.is_grad_enabled

# AccumulateGrad and the graph root carry the largest numbers there are: no forward made them.
_NO_FORWARD = 1 << 62


class _Pass:
    """One call of the autograd engine."""

    __slots__ = ("create_graph", "intervals", "replays", "retain_graph", "sites", "timeline")

    def __init__(self, timeline: Timeline, retain_graph: bool, create_graph: bool, replays: int) -> None:
        self.timeline = timeline
        self.retain_graph = retain_graph
        self.create_graph = create_graph
        self.replays = replays
        self.intervals: set[int] = set()  # of the timeline, that its nodes fall into
        self.sites: list[int] = []  # nodes whose forward multiplied a parameter


# What a module's exit must undo: previous frame, parent, frame, timeline, 1 inside a backward, 1 where it is replayed.
Call = tuple[Frame, Frame, Frame, Timeline, int, int]


class Whereabouts:
    """The running frame and phase, in forward by the module stack, in backward by the autograd node."""

    def __init__(self, names: Names, read_line: Callable[[], str] | None = None) -> None:
        self.names = names
        self._read_line = read_line  # given where lines are told apart
        self.frame = names.root
        self._depth = 0
        self.steps: list[FrameType] = []  # optimizer steps under way, by the Python frame that runs each
        self._timelines = {threading.get_ident(): Timeline(names.root)}
        self._timeline = self._timelines[threading.get_ident()]
        self._passes: list[_Pass] = []
        self._pass: _Pass | None = None
        self._replays = 0  # modules and checkpointed functions that run inside this backward
        self._checkpoints = 0  # those of them, in any backward, that only run what ran before
        self._replayed_lines: list[str] = []  # that called the checkpoints being replayed
        self.higher = 0  # higher-order operators, whose own backward runs with grad mode on
        self._owned = -2
        self._owner = names.root

    def open(self) -> None:
        """The counter is entered by this thread."""
        thread = threading.get_ident()
        if thread in self._timelines and self._timelines[thread].behind(_sequence()):
            del self._timelines[thread]
        self._timeline = self._here()
        self._timeline.note(_sequence(), self.frame)

    def close(self) -> None:
        """The counter is left: whatever an exception interrupted is over."""
        self.frame, self._pass, self._passes = self.names.root, None, []
        self._replays = self._checkpoints = self.higher = 0
        self._replayed_lines = []
        self.steps = []
        self._timeline.note(_sequence(), self.frame)

    # --- asked at every operator ---------------------------------------------------------------
    def now(self) -> tuple[Frame, Phase]:
        """Frame and phase of whatever runs now."""
        node = _node()
        if node is None:
            return self.frame, "optimizer" if self.stepping() else "forward"
        return self.backward(node)

    def backward(self, node: Any) -> tuple[Frame, Phase]:
        """Frame and phase of an operator that runs while the engine evaluates `node`."""
        if self.steps and self.stepping():
            return self.frame, "optimizer"
        sequence = node._sequence_nr()
        if sequence != self._owned:
            self._owned = sequence
            self._owner = self._owner_of(sequence)
        frame = self.frame if self._replays else self._owner
        if not _grad_enabled() or self.higher:
            return frame, "recompute" if self._checkpoints else "backward"
        timeline = self._here()
        made = _sequence()
        if made != timeline.last:
            # These nodes were made by this node's backward: they belong where it does.
            timeline.note(timeline.last, frame)
            timeline.last = made
        differentiated = self._pass is not None and self._pass.create_graph and not self._checkpoints
        return frame, "backward" if differentiated else "recompute"

    def _owner_of(self, sequence: int) -> Frame:
        if sequence >= _NO_FORWARD:
            return self.names.root
        current = self._pass
        if current is None:
            return self._timeline.owner(sequence)[1]
        start, frame = current.timeline.owner(sequence)
        current.intervals.add(start)
        return frame

    def _here(self) -> Timeline:
        # Sequence numbers are per thread, and CUDA's backward runs in threads of its own.
        thread = threading.get_ident()
        timeline = self._timelines.get(thread)
        if timeline is None:
            timeline = self._timelines[thread] = Timeline(self.names.root)
        return timeline

    def remember(self, row: Any) -> None:
        """The operator that ran just now, a call of this row, is differentiated by the node made last."""
        timeline = self._timeline if self._pass is None else self._here()
        timeline.remember(_sequence() - 1, row)

    def origin(self) -> Any:
        """The row of the forward operator that the running backward operator differentiates; None: not known."""
        if self._checkpoints:  # what is replayed differentiates nothing
            return None
        current = self._pass
        if current is None:
            return self._timeline.made_by(self._owned)
        current.sites.append(self._owned)
        return current.timeline.made_by(self._owned)

    def remember_line(self, line: str, *, first: bool = False) -> None:
        """The operator that runs now, in the node made last, was called on this line; `first`: unless one is known."""
        timeline = self._timeline if self._pass is None else self._here()
        timeline.remember_line(_sequence() - 1, line, first=first)

    def note_line(self) -> None:
        """An operator ran: where lines are told apart, its node has this one, if it made a node and has none yet."""
        line = self.line_here() if self._read_line is not None and _grad_enabled() else ""
        if line:
            self.remember_line(line, first=True)

    def line_here(self) -> str:
        """The line that runs now, where lines are told apart."""
        return "" if self._read_line is None else self._read_line()

    def line(self) -> str:
        """The line that called the checkpoint being replayed, or the forward of the running backward operator."""
        if self._replayed_lines and self._replayed_lines[-1]:
            return self._replayed_lines[-1]
        current = self._pass
        if current is None:
            return self._timeline.line(self._owned)
        current.sites.append(self._owned)
        return current.timeline.line(self._owned)

    # --- told by the instrumentation -----------------------------------------------------------
    def enter(self, module: torch.nn.Module | None, region: str = "", visible: tuple[int, int] | None = None) -> Call:
        """A module is called, a region entered, or causal attention with so many (visible, all) pairs computed."""
        previous = parent = self.frame
        timeline, replays, replayed = self._timeline, 0, 0
        node = _node()
        if node is not None:
            timeline, replays = self._here(), 1
            if not (self._replays or self.stepping()):
                # With grad mode on, in a backward that builds no graph of its own, it is what a checkpoint replays.
                parent, phase = self.backward(node)
                replayed = int(phase == "recompute")
        if module is not None:
            known = parent.children.get(id(module))
            if known is not None and known.module is not None and known.module() is module:
                frame = known
            else:
                frame = self.names.enter(parent, module)
        else:
            frame = self.names.region(parent, region) if visible is None else self.names.masked(parent, visible)
        if not replays and (frame.module is None or frame.module() is module):
            frame.calls += 1
        self.frame = frame
        self._replays += replays
        self._checkpoints += replayed
        timeline.note(_sequence(), frame)
        return previous, parent, frame, timeline, replays, replayed

    def leave(self, call: Call) -> None:
        """The call is over, by return or by exception."""
        self.frame, parent, _frame, timeline, replays, replayed = call
        self._replays -= replays
        self._checkpoints -= replayed
        timeline.note(_sequence(), parent)

    def enter_pass(self, *, retain_graph: bool, create_graph: bool) -> None:
        """The autograd engine is called."""
        timeline = self._here()
        timeline.last = _sequence()
        self._pass = _Pass(timeline, retain_graph, create_graph, self._replays)
        self._passes.append(self._pass)
        self._replays, self._owned = 0, -2

    def leave_pass(self) -> None:
        """The autograd engine is done, by return or by exception."""
        if not self._passes:  # the counter was closed and emptied meanwhile
            return
        done = self._passes.pop()
        self._pass = self._passes[-1] if self._passes else None
        self._replays, self._owned = done.replays, -2
        done.timeline.note(_sequence(), self.frame)
        if done.intervals and not done.retain_graph:
            done.timeline.freed(done.intervals, done.sites)

    def enter_replay(self, frame: Frame | None, line: str = "") -> Frame:
        """A checkpointed function is run again: in the frame and line that called the checkpoint, or in the node's."""
        previous, node = self.frame, _node()
        if frame is None:
            frame = self.names.root if node is None else self.backward(node)[0]
        self.frame = frame
        self._replayed_lines.append(line)
        self._replays += 1
        self._checkpoints += 1
        self._here().note(_sequence(), frame)
        return previous

    def leave_replay(self, previous: Frame) -> None:
        """The replay is over; `previous` is what enter_replay returned."""
        self.frame = previous
        del self._replayed_lines[-1:]  # it may be empty: the counter was closed meanwhile
        self._replays -= 1
        self._checkpoints -= 1
        self._here().note(_sequence(), previous)

    def stepping(self) -> bool:
        """Is an optimizer's step running? torch tells of no step that raised: its frame has then left the stack."""
        while self.steps:
            # A step's operators mostly run at one depth, and the interpreter finds a frame by depth without walking.
            step = self.steps[-1]
            try:
                if sys._getframe(self._depth) is step:
                    return True
            except ValueError:  # the stack is not that deep
                pass
            depth = _depth(step)
            if depth:
                self._depth = depth
                return True
            self.steps.pop()
        return False

    def leave_step(self, step: FrameType) -> None:
        """The optimizer's step that this frame runs is over, and so are those inside it."""
        if step in self.steps:
            del self.steps[self.steps.index(step) :]


def _depth(step: FrameType) -> int:
    """How many frames above the caller's `step` is; 0 where it is not on the stack."""
    depth, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
        if frame is step:
            return depth
    return 0
