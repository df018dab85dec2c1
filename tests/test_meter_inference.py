"""Inference mode inside, around and across steps: its end brings back what of modes there was at its beginning."""

import pytest
import torch
from torch import nn

from flopprof import Meter

PER_ROW = 2 * 8 * 4  # forward; the weight's gradient is as much, the input needs none


def flops(meter: Meter) -> list[int | None]:
    return [record.model_flops for record in meter.records]


def no_mode_is_left() -> bool:
    torch.randn(3) + 1  # a Python dispatch key without a mode fails here
    return torch._C._len_torch_dispatch_stack() == 0


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(8, 4)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("before", [True, False])
def test_evaluation_in_a_step_that_is_counted(model: nn.Module, before: bool, context: type) -> None:
    def evaluate() -> None:
        model.eval()
        with context():
            model(torch.randn(9, 8))
        model.train()

    rows = [2, 2, 2, 2, 5, 5, 2, 7, 3]
    with Meter(model, recount_every=4) as meter:
        for i, n in enumerate(rows):
            with meter.step():
                if before and i % 2 == 0 and i:
                    evaluate()
                model(torch.randn(n, 8)).sum().backward()
                if not before and i % 2 == 0:
                    evaluate()
                assert torch.equal(torch.zeros(2) + 1, torch.ones(2))
        assert flops(meter) == [2 * n * PER_ROW for n in rows]
    assert no_mode_is_left()


def test_a_pause_in_inference_mode(model: nn.Module) -> None:
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                model(torch.randn(2, 8)).sum().backward()
                with torch.inference_mode(), meter.pause("evaluation"):
                    model(torch.randn(9, 8))
        assert flops(meter) == [4 * PER_ROW] * 4
    assert no_mode_is_left()


def test_a_teacher_in_inference_mode(model: nn.Module) -> None:
    """A new size is seen first where no counter may be opened: counted when it comes again, from the step's start."""
    teacher, rows = nn.Linear(8, 4).eval(), [2, 2, 2, 2, 5, 5, 2, 7, 7, 3, 5]
    with Meter(model, teacher) as meter:
        for n in rows:
            with meter.step():
                x = torch.randn(n, 8)
                with torch.inference_mode():
                    wanted = teacher(x)
                (model(x) - wanted.clone()).sum().backward()
        meter.summary()
        for n, found in zip(rows, flops(meter), strict=True):
            assert found in (3 * n * PER_ROW, None), n
        assert sum(found is None for found in flops(meter)) <= 1
    assert no_mode_is_left()


def test_a_step_that_ends_in_inference_mode_which_began_in_it(model: nn.Module) -> None:
    meter = Meter(model)
    for _ in range(3):
        meter.start_step()
        model(torch.randn(2, 8)).sum().backward()
        with torch.inference_mode():
            meter.end_step()
        torch.randn(3) + 1
    assert flops(meter) == [4 * PER_ROW] * 3
    meter.close()
    assert no_mode_is_left()


def test_a_loop_in_inference_mode(model: nn.Module) -> None:
    rows = [2, 2, 2, 5, 5, 7, 7]
    with Meter(model) as meter, torch.inference_mode():
        for batch in meter.track([torch.randn(n, 8) for n in rows], progress=False):
            model(batch)
        assert flops(meter) == [n * PER_ROW for n in rows]
    assert no_mode_is_left()
