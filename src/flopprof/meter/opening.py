"""The counter of a step under way: open where something new runs, and closed on the same side of all else.

A mode may be opened inside other contexts of the loop's only where it is sure to be closed before them. The end of
inference mode brings back what of modes there was at its beginning: a counter is opened and closed on the same side.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode

from flopprof.counting.runtime import FlopCounter
from flopprof.counting.tally import Tally
from flopprof.meter.models import Roots
from flopprof.meter.work import Work, work_of
from flopprof.profile import Attention

_modes = torch._C._len_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at
_inference = torch.is_inference_mode_enabled


class StepCounter:
    """Opens a counter in a step, and closes it."""

    def __init__(self, models: Roots, attention: Attention) -> None:
        self._models, self._attention = models, attention
        self.open: FlopCounter | None = None
        self.modes = 0  # at the start of the step
        self._inference: bool | None = False  # at the start of the step; None: not known
        self._left: FlopCounter | None = None  # that could not be closed where it was no longer needed
        self._suspended: tuple[FlopCounter, Tally] | None = None

    def begin(self) -> None:
        """A step begins here."""
        self._inference = _inference()
        self.leave_late()
        self.modes = _modes()

    def go_on(self, modes: int) -> None:
        """A step is followed from here on, at whose start there were so many modes."""
        self._inference = None if _inference() else False
        self.modes = modes

    def may_open(self) -> bool:
        """Is everything closed that was opened since the step's start?"""
        return _modes() == self.modes and _inference() == self._inference

    def enter(self) -> None:
        """Count from here on."""
        self._enter(FlopCounter(self._models.named(), attention=self._attention))

    def take(self, *, optimizer: bool) -> Work | None:
        """What was counted since the last time; None where nothing is. optimizer: an optimizer's products count."""
        counter = self.open
        if counter is None:
            return None
        tally, counter.tally = counter.tally, Tally()
        return work_of(tally.profile(counter._names.frames, counter.model, self._attention), optimizer=optimizer)

    def suspend(self) -> None:
        """What runs from here to `resume` is not counted."""
        counter = self.open
        if counter is not None:
            self._suspended = counter, counter.tally
            if _mode_at(_modes() - 1) is counter and _inference() == self._inference:
                self.leave()
            else:
                counter.tally = Tally()

    def resume(self) -> None:
        """Go on counting, where this is where it was suspended: else what was counted so far is lost."""
        if self._suspended is not None:
            (counter, tally), self._suspended = self._suspended, None
            if self.open is counter:
                counter.tally = tally
            elif self.may_open():
                self._enter(counter)

    def leave(self) -> None:
        """Count no more."""
        counter, self.open = self.open, None
        if counter is None:
            return
        self._models.closed()
        if _inference() == self._inference:
            _close(counter)
        else:
            self._left = counter

    def leave_late(self) -> None:
        """Close a counter that could not be closed at the end of its step."""
        if self._left is not None and not _inference():
            _close(self._left)
            self._left = None

    def _enter(self, counter: FlopCounter) -> None:
        counter.__enter__()
        self.open = counter
        self._models.opened()


def _close(counter: FlopCounter) -> None:
    """Close it, wherever it is among the open ones."""
    above = []
    while _modes() and _mode_at(_modes() - 1) is not counter:  # somebody left a mode of their own open
        above.append(_pop_mode())
    counter.__exit__(None, None, None)
    for mode in reversed(above):
        _push_mode(mode)
