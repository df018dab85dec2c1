"""MFU as TensorBoard scalars: `Meter(..., log=scalars(writer))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flopprof.meter.logged import Logged


class Writer(Protocol):
    """A SummaryWriter of torch.utils.tensorboard or of tensorboardX."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """One number of one step."""


def scalars(writer: Writer, *, every: int = 10) -> Callable[[dict[str, float]], None]:
    """What a meter's `log=` wants: writes each of its figures as a scalar, at the step that it is of.

    every  how often it is called, where what calls it does not tell the step
    """
    written = 0

    def write(metrics: dict[str, float]) -> None:
        nonlocal written
        written = metrics.step if isinstance(metrics, Logged) else written + every
        for name, value in metrics.items():
            writer.add_scalar(name, value, written)

    return write
