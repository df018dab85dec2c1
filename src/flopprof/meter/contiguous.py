"""A meter whose steps follow each other without a gap, and are told to have ended only by what comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flopprof.errors import UsageError
from flopprof.meter.meter import Meter
from flopprof.meter.steps import OpenStep

_modes = torch._C._len_torch_dispatch_stack
# A step without a call of a module is told from others by little: so often it is counted again.
RECOUNT_WITHOUT_CALLS = 8


class Contiguous(Meter):
    """A meter whose steps follow each other without a gap; the latest may prove to be a part of a longer one."""

    _ends_known = False
    _undecided = 0  # of the latest steps, so many wait
    trouble = ""  # why there are no more records in the file

    def start_step(self, batch: Any = None, *, data_wait_s: float = 0.0) -> None:
        """As a meter does; inside a dispatch mode of the script's own, which may end in mid-step, none is opened."""
        others, tracker = _modes(), self._recorder.tracker
        super().start_step(batch, data_wait_s=data_wait_s)
        tracker.counter.modes = 0
        if others and tracker.counter.open is not None:
            tracker.counter.leave()
            tracker.from_start = True

    def boundary(self) -> None:
        """An optimizer has stepped: what comes next may belong to this step, or to the next one."""
        self._undecided += 1
        self.end_step()
        if self._undecided == 2:
            second, first = self._late.pop(), self._late.pop()
            self._late.append(_joined(first, second))
            self._begun -= 1
            self._undecided = 1
        step = self._late[-1]
        if not step.calls and step.number % RECOUNT_WITHOUT_CALLS == 0:
            self._recorder.tracker.from_start = True
        self.start_step()

    def decide(self) -> bool:
        """The latest step is over. False: that was known."""
        if not self._undecided:
            return False
        self._undecided = 0
        self._settle_soon()
        return True

    def fits(self, parameter: torch.Tensor) -> bool:
        """Is what is trained where it was thought to be, or is it too late to ask?"""
        return bool(self._late or self._history.records) or str(parameter.device) == self.device

    def aside(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a call whose time is a row of its own, and after which the step goes on as before it."""
        if self._open is None or self._recorder._span is not None:
            return call(*args, **kwargs)
        with self.pause(name):
            return call(*args, **kwargs)

    def drop(self) -> None:
        """The step under way will not end."""
        step = self._open
        if step is not None:
            self._recorder.close(step, failed=True)

    def _settle(self, *, wait: bool = False) -> None:
        held = [self._late.pop() for _ in range(min(self._undecided, len(self._late)))]
        try:
            super()._settle(wait=wait)
        except (UsageError, OSError) as error:  # the file cannot be made: what is metered goes on without
            self.trouble = str(error)
            self._history._path = None
            if self._late and self._history.records and self._late[0].number == self._history.records[-1].step:
                self._late.popleft()
            super()._settle(wait=wait)
        self._late.extend(reversed(held))

    def close(self) -> None:
        """As a meter does; were all records written?"""
        self._settle(wait=True)
        history = self._history
        if history._writer is not None and not history._writer._close.alive and not self._closed:
            self.trouble = f"cannot write all records to {str(history._path)!r}: the file ends early."
        super().close()


def _joined(first: OpenStep, second: OpenStep) -> OpenStep:
    """Two steps that were one."""
    second.number, second.start = first.number, first.start
    for name in ("calls", "optimizer_steps", "tokens", "samples", "other_tokens", "other_samples", "data_wait_s"):
        setattr(second, name, getattr(first, name) + getattr(second, name))
    for name in ("segments", "spans", "unpadded", "left_out"):
        setattr(second, name, getattr(first, name) + getattr(second, name))
    second.unseen |= first.unseen
    return second
