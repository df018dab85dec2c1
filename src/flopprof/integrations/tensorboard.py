"""MFU as TensorBoard scalars: `Meter(..., log=scalars(writer))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Writer(Protocol):
    """A SummaryWriter of torch.utils.tensorboard or of tensorboardX."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """One number of one step."""


def scalars(writer: Writer, *, every: int = 10) -> Callable[[dict[str, float]], None]:
    """What a meter's `log=` wants: writes each of its figures as a scalar, at the step that it is of.

    every  the meter's `log_every`
    """
    written = 0

    def write(metrics: dict[str, float]) -> None:
        nonlocal written
        written += every
        for name, value in metrics.items():
            writer.add_scalar(name, value, written)

    return write
