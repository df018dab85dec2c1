"""What the callbacks of trainers have in common: a meter whose steps a trainer begins and ends."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch

from flopprof.errors import UsageError
from flopprof.meter import Meter
from flopprof.meter.roots import Roots, find_roots


class Following:
    """One training run. options: those of flopprof.Meter but its models, which are found as they are called."""

    def __init__(self, module: torch.nn.Module, options: dict[str, Any], *, step: int) -> None:
        parameter = next(module.parameters(), None)
        if parameter is None:
            raise UsageError(f"{type(module).__name__} has no parameters: there is nothing to train, and to meter.")
        self.meter = Meter(**options)
        self._roots: Roots = find_roots(self.meter, parameter)
        self.meter.go_on_from(step)
        self.open = self._waits = False
        self._since = time.perf_counter()
        # Where training raises, no trainer says so: the hooks go with the callback.
        self._remove = weakref.finalize(self, self._roots.remove)
        self._roots.install()
        self._roots.disarm()

    def begin(self, batch: Any = None) -> None:
        """A step begins; since something else was told of, its data was waited for."""
        if self.open:
            return
        self.meter.start_step(batch, data_wait_s=time.perf_counter() - self._since)
        self.open = True
        self._roots.arm()

    def wait(self) -> None:
        """Inside the step, more data is waited for."""
        self.meter._recorder.pause("data_wait")
        self._waits = True

    def go_on(self) -> None:
        """It is there."""
        if self._waits:
            self._waits = False
            self.meter._recorder.resume()

    def instead(self, name: str) -> None:
        """Inside the step, what the time that data is waited for goes to from here on: evaluation, or data_wait."""
        if self._waits:
            self.meter._recorder.pause(name)

    def end(self) -> None:
        """The step is over."""
        if self.open:
            self.open = False
            self._roots.disarm()
            self.meter.end_step()
            self._since = time.perf_counter()

    def passed(self, name: str) -> None:
        """Until now, and since the last that was told of, something else was done."""
        now = time.perf_counter()
        if not self.open:
            self.meter.passed(name, now - self._since)
        self._since = now

    def close(self) -> None:
        """Training is over; what was found stays in the meter."""
        self._remove()
        self.meter.close()


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a Meter. Raises UsageError at once for those that are wrong, and not when training begins."""
    Meter(**{**options, "records": None}).close()
    return options
