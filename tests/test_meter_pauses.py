"""A pause, or an evaluation, is no part of the step: what runs before it and behind it is as if it were not there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flopprof import Meter

PER_ROW = 2 * 8 * 4
SIDE = 50
BESIDE = 2 * SIDE**3  # what the loop multiplies itself
CONTEXTS = [nullcontext, torch.no_grad, torch.inference_mode]

square = torch.ones(SIDE, SIDE)


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(8, 4, bias=False)


def flops(meter: Meter) -> list[int | None]:
    meter.summary()
    return [record.model_flops for record in meter.records]


def paused(meter: Meter, model: nn.Module, context: Callable[[], AbstractContextManager[object]]) -> None:
    with meter.pause("generation"), context():
        model(torch.ones(9, 8)).sum() + (square @ square).sum()


def evaluated(_: Meter, model: nn.Module, context: Callable[[], AbstractContextManager[object]]) -> None:
    model.eval()
    with context(), torch.no_grad():
        model(torch.ones(9, 8)) @ torch.ones(4, 4)
    model.train()


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_runs_behind_a_pause_is_of_the_step(model: nn.Module, context: type) -> None:
    rows = [2, 2, 2, 5, 2, 7, 3, 5]
    with Meter(model, recount_every=3) as meter:
        for n in rows:
            with meter.step():
                out = model(torch.ones(n, 8))
                square @ square
                paused(meter, model, context)
                square @ square
                out.sum().backward()
                paused(meter, model, context)
                square @ square
        assert flops(meter) == [2 * n * PER_ROW + 3 * BESIDE for n in rows]
        assert not [note for note in meter.summary().notes if "differed" in note]


@pytest.mark.parametrize("beside", [paused, evaluated])
@pytest.mark.parametrize("context", CONTEXTS)
def test_steps_with_a_pause_are_like_those_without(
    model: nn.Module, context: type, beside: Callable[..., None]
) -> None:
    """Before a gradient, or after it: nothing is counted anew."""
    with Meter(model, skip=0) as meter:
        for i in range(12):
            with meter.step():
                loss = model(torch.ones(2, 8)).sum()
                if i % 3 == 1:
                    beside(meter, model, context)
                loss.backward()
                if i % 3 == 2:
                    beside(meter, model, context)
        assert flops(meter) == [4 * PER_ROW] * 12
        assert [i for i, record in enumerate(meter.records) if "counted" in record.left_out] == [0]
        assert meter.summary().signatures == 1


@pytest.mark.parametrize("beside", [paused, evaluated])
def test_a_backward_pass_ends_an_evaluation_and_no_pause(model: nn.Module, beside: Callable[..., None]) -> None:
    now = 0.0
    with Meter(model, clock=lambda: now, skip=0) as meter:
        for _ in range(4):
            with meter.step():
                now += 1
                loss = model(torch.ones(2, 8)).sum()
                beside(meter, model, torch.no_grad)
                loss.backward()
                now += 2
        assert flops(meter) == [4 * PER_ROW] * 4
        assert {record.step_time_s for record in meter.records} == {3.0}


def test_a_pause_inside_a_pause_is_one(model: nn.Module) -> None:
    now = 0.0
    with Meter(model, clock=lambda: now, skip=0) as meter:
        for _ in range(3):
            with meter.step():
                out = model(torch.ones(2, 8))
                with meter.pause("outer"):
                    square @ square
                    now += 1
                    with meter.pause("inner"):
                        square @ square
                        now += 2
                now += 4
                square @ square
                out.sum().backward()
        assert flops(meter) == [4 * PER_ROW + BESIDE] * 3
        assert {record.step_time_s for record in meter.records} == {4.0}


def test_a_pause_that_ends_inside_a_context_that_it_did_not_begin_in(model: nn.Module) -> None:
    """A counter of ours may not be opened above a mode that is closed before it: such steps have no figure."""
    with Meter(model, skip=0) as meter:
        for _ in range(4):
            with meter.step():
                out = model(torch.ones(2, 8))
                pause = meter.pause("generation")
                pause.__enter__()
                with FlopCounterMode(display=False) as mode:
                    pause.__exit__(None, None, None)
                    square @ square
                    out.sum().backward()
                assert mode.get_total_flops() == BESIDE + 2 * PER_ROW
        assert {*flops(meter)} <= {None, 4 * PER_ROW + BESIDE}
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_step_that_fails_in_a_pause(model: nn.Module, context: type) -> None:
    with Meter(model, skip=0) as meter:
        for i in range(6):
            try:
                with meter.step():
                    out = model(torch.ones(2, 8))
                    with meter.pause("generation"), context():
                        if i in {0, 3}:
                            raise KeyError(i)
                    square @ square
                    out.sum().backward()
            except KeyError:
                pass
        assert [told for i, told in enumerate(flops(meter)) if i not in {0, 3}] == [4 * PER_ROW + BESIDE] * 4
        assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("when", ["each", "once", "before the last"])
def test_calls_in_a_row_go_on_behind_a_pause(model: nn.Module, when: str) -> None:
    """What all chunks of a batch gave is multiplied behind the last of them."""
    head = nn.Linear(4, 1, bias=False)
    numbers = [2, 5, 3, 7, 4, 2, 8, 5, 3, 6] * 3
    with Meter(model, head, skip=0) as meter:
        for k in numbers:
            with meter.step():
                chunks = []
                for i in range(k):
                    if when == "each" or i == (1 if when == "once" else k - 1):
                        paused(meter, model, torch.no_grad)
                    with torch.no_grad():
                        chunks.append(model(torch.ones(3, 8)))
                z = torch.cat(chunks)
                z @ z.T
                head(torch.ones(2, 4)).sum().backward()
        expected = [3 * k * PER_ROW + 2 * (3 * k) ** 2 * 4 + 2 * 2 * 2 * 4 for k in numbers]
        assert flops(meter) == expected
