"""Evaluations between steps, which nobody says the end of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flopprof.meter.timing import Timer


class _Evaluation(NamedTuple):
    """One that is over. step: the next one's number; at: its end by the host's clock; waited: for data, since then."""

    start: Any
    end: Any
    step: int
    at: float
    waited: float


class Evaluations:
    """Those between steps. start: of the one under way, if one is."""

    def __init__(self) -> None:
        self.start: Any = None
        self._over: list[_Evaluation] = []

    def end(self, timer: Timer, *, step: int, at: float, waited: float) -> None:
        """The one under way, if one is, was over before data was waited for that long; then that step comes."""
        if self.start is not None:
            self._over.append(_Evaluation(self.start, timer.mark(), step, at - waited, waited))
            self.start = None

    def over(self, timer: Timer, *, wait: bool) -> Iterator[tuple[float, int, float]]:
        """(seconds, number of the next step, the host's time at the end) of each that was not told yet."""
        while self._over:
            start, end, step, at, waited = self._over[0]
            seconds = timer.seconds(start, end, wait=wait)
            if seconds is None:
                return
            del self._over[0]
            yield max(seconds - waited, 0.0), step, at

    def under_way_s(self, timer: Timer) -> float:
        """Seconds of the one that is not over, until now."""
        return 0.0 if self.start is None else timer.seconds(self.start, timer.mark(), wait=True) or 0.0

    def forget(self) -> None:
        """None of them is told."""
        self.start = None
        self._over.clear()
