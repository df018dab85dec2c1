"""Clocks of a step: the host's, or a CUDA stream's own events, which are read when they are past."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Timer(Protocol):
    """Marks moments, and later says how many seconds lie between two of them."""

    def mark(self) -> Any:
        """This moment."""

    def seconds(self, start: Any, end: Any, *, wait: bool = False) -> float | None:
        """From start to end; None where the end is not past yet, unless it shall be waited for."""


class HostTimer:
    """Moments of a clock of this process, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.mark = clock

    def seconds(self, start: float, end: float, *, wait: bool = False) -> float | None:
        """The difference, known at once."""
        return end - start


class CudaTimer:
    """Events on the current CUDA stream: recorded without waiting, read once the device is past them."""

    def __init__(self) -> None:
        import torch

        self._event: Any = torch.cuda.Event

    def mark(self) -> Any:
        """An event behind all work that was queued so far."""
        event = self._event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any, *, wait: bool = False) -> float | None:
        """The device's own time between the two."""
        if wait:
            end.synchronize()
        elif not end.query():
            return None
        return float(start.elapsed_time(end)) / 1e3


def timer_for(device: str, clock: Callable[[], float]) -> Timer:
    """Of a clock of one's own that clock; else a GPU's own time where there is one."""
    return CudaTimer() if clock is time.perf_counter and device.startswith("cuda") else HostTimer(clock)


def device_of(models: Iterable[torch.nn.Module]) -> str:
    """Where the models live, by their first parameter or buffer."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            return str(tensor.device)
    return "cpu"
