"""The kinds of batches that a loop is given. In a closure, or compiled, a call could not be counted once it is made."""

from __future__ import annotations

from typing import Any

from flopprof.meter.arguments import arguments

# So many kinds are counted as soon as they come.
_MOST = 16


class Batches:
    """Those that came so far."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def new(self, batch: Any) -> bool:
        """Is the batch unlike those before? (The first one is like none, but that is nothing new.)"""
        if batch is None or len(self._seen) >= _MOST:
            return False
        told = arguments((batch,), {})
        new = bool(self._seen) and told not in self._seen
        self._seen.add(told)
        return new
