"""What optimizers step, as numbers: two of one class may multiply for parameters of their own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from flopprof.meter.places import number
from flopprof.meter.signature import shapes_of


class Optimizers:
    """A number for each optimizer, by what it steps: two of one class may multiply for parameters of their own."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[tuple[int, ...], int]] = weakref.WeakKeyDictionary()

    def number(self, optimizer: torch.optim.Optimizer) -> int:
        """The same in every process."""
        groups = [group["params"] for group in optimizer.param_groups]
        sizes = tuple(map(len, groups))
        known, number = self._known.get(optimizer, ((), 0))
        if sizes != known or not number:
            number = _group_number(groups)
            self._known[optimizer] = sizes, number
        return number


def stepped_number(optimizer: torch.optim.Optimizer) -> int:
    """For the shapes of the parameters that it steps: those that have a gradient."""
    groups = [
        [parameter for parameter in group["params"] if parameter.grad is not None] for group in optimizer.param_groups
    ]
    return _group_number(groups)


def _group_number(groups: Iterable[Iterable[torch.Tensor]]) -> int:
    return number(repr([shapes_of(group) for group in groups]))
