"""Blocks whose work depends on what an object without attributes keeps: each runs by itself, and counts as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flopprof

WIDTH, BLOCKS = 8, 8
ONCE = 2 * 3 * 2 * WIDTH * WIDTH  # three rows through two layers


class Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


def of_slots(slots: Slots) -> bool:
    slots.calls += 1
    return slots.calls % 4 == 0


def of_array(array: Any) -> bool:
    array[0] += 1
    return bool(array[0] % 4 == 0)


def of_variable(variable: ContextVar[int]) -> bool:
    variable.set(variable.get(0) + 1)
    return variable.get() % 4 == 0


KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], bool]]] = {
    "count": (itertools.count, lambda count: next(count) % 4 == 3),
    "iterator": (lambda: iter(range(99)), lambda numbers: next(numbers) % 4 == 3),
    "slots": (Slots, of_slots),
    "array": (lambda: np.zeros(1, int), of_array),
    "bytes": (lambda: bytearray(1), of_array),
    "variable": (lambda: ContextVar("calls"), of_variable),
    "Generator": (lambda: np.random.default_rng(0), lambda chance: bool(chance.random() < 0.5)),
    "RandomState": (lambda: np.random.RandomState(0), lambda chance: bool(chance.rand() < 0.5)),
}
shared: Any = None


class Block(nn.Module):
    def __init__(self, kept: Any, twice: Callable[[Any], bool]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kept, self.twice = kept, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2 if self.twice(self.kept) else 1):
            x = x + self.down(torch.relu(self.up(x)))
        return x


class Global(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2 if self.twice(shared) else 1):
            x = x + self.down(torch.relu(self.up(x)))
        return x


@pytest.mark.parametrize("block", [Block, Global])
@pytest.mark.parametrize("name", KEPT)
def test_what_counts_calls_or_draws_is_seen(name: str, block: type[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    make, twice = KEPT[name]

    def counted(**options: Any) -> int:
        kept = make()
        monkeypatch.setitem(globals(), "shared", kept)
        own = None if block is Global else kept
        model = nn.Sequential(*[block(own, twice) for _ in range(BLOCKS)]).to("meta")
        return flopprof.count(model, torch.empty(3, WIDTH, device="meta"), **options).forward_flops

    drawn = make()
    assert counted() == counted(fold=False) == ONCE * (BLOCKS + sum(twice(drawn) for _ in range(BLOCKS)))
