"""Models that are compiled beside the meter, or in place: no step is told wrong, and most are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flopprof import Meter
from two_layers import Net

ROWS = [8, 8, 8, 8, 3, 8, 8, 8, 8, 3, 8, 8, 8, 8, 3]
EACH = 2 * (2 * 8 * 16 + 3 * 16 * 2)  # per row: the first layer's input wants no gradient


def stack() -> nn.Module:
    """torch compiles its hooks with it."""
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 2, bias=False))


def beside(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    compiled: Any = torch.compile(model, backend="eager")
    return compiled


def in_place(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    model.compile(backend="eager")
    return model


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("compiled", [beside, in_place])
@pytest.mark.parametrize("make", [Net, stack])
def test_no_step_of_a_compiled_model_is_told_wrong(
    make: Callable[[], nn.Module], compiled: Callable[..., Any], tracked: bool
) -> None:
    model = make()
    batches = [torch.randn(n, 8) for n in ROWS]
    with Meter(model) as meter:
        call = compiled(model)
        for x in meter.track(batches, progress=False) if tracked else batches:
            if tracked:
                call(x).square().mean().backward()
            else:
                with meter.step():
                    call(x).square().mean().backward()
        notes = meter.summary().notes
        found = [record.model_flops for record in meter.records]
    assert all(got in (n * EACH, None) for n, got in zip(ROWS, found, strict=True))
    if compiled is in_place:
        assert None not in found
    elif make is Net:
        assert found.count(None) <= 3  # the smaller batch, until it is counted from the start of a step
    elif tracked:
        assert None not in found
    else:
        assert found[1:] == [None] * (len(ROWS) - 1)
        assert "inside a compiled function" in notes[0]


def test_a_part_that_is_compiled_is_no_list_of_its_parts() -> None:
    """A compiled module has a length only where what it compiles has one."""
    model = stack()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[index, operator]
    with Meter(model) as meter:
        for n in ROWS:
            with meter.step():
                model(torch.randn(n, 8)).square().mean().backward()
        meter.summary()
        found = [record.model_flops for record in meter.records]
    assert all(got in (n * EACH, None) for n, got in zip(ROWS, found, strict=True))
