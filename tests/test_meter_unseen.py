"""Work that no call of a model tells of: before the first one, in other methods than forward, in closures."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from flopprof import Meter

ROWS = [2, 2, 8, 8, 16, 16, 4, 12, 12, 3]


def flops(meter: Meter) -> list[int | None]:
    meter.summary()
    return [record.model_flops for record in meter.records]


def fed(rows: list[int]) -> list[torch.Tensor]:
    return [torch.randn(n, 4) for n in rows]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sum()


EACH = 2 * 2 * 4 * 5  # per row: forward and the weight's gradient


def test_what_runs_before_the_first_call_is_told_by_that_call() -> None:
    table, layer = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 2, bias=False)
    with Meter(layer) as meter:
        for x in fed(ROWS):
            with meter.step():
                layer(x @ table).sum().backward()
        assert flops(meter)[:2] == [2 * (EACH + 3 * 2 * 5 * 2)] * 2
        for n, found in zip(ROWS, flops(meter), strict=True):
            assert found in (n * (2 * 2 * 4 * 5 + 3 * 2 * 5 * 2), None)
        assert sum(found is None for found in flops(meter)) <= 4  # a size is counted when it comes again

        meter.load_state_dict(meter.state_dict())
        with meter.step():
            layer(torch.randn(8, 4) @ table).sum().backward()
        assert flops(meter)[-1] == 8 * (EACH + 3 * 2 * 5 * 2)


@pytest.mark.parametrize("call", [Model.loss, lambda model, x: model.forward(x).sum()])
def test_a_method_beside_the_call_is_told_by_the_batch(call: Callable[[Model, torch.Tensor], torch.Tensor]) -> None:
    model = Model()
    with Meter(model) as meter:
        for x in meter.track(fed(ROWS), progress=False):
            call(model, x).backward()
        assert flops(meter) == [EACH * n for n in ROWS]
        assert not any("whose inputs are not seen" in note for note in meter.summary().notes)


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_is_called_and_bypassed_in_turn(seed: int) -> None:
    chance = random.Random(seed)
    model = Model()
    rows = [chance.choice([2, 3, 5, 9]) for _ in range(80)]
    with Meter(model) as meter:
        for x in meter.track(fed(rows), progress=False):
            (model(x) if chance.random() < 0.6 else model.forward(x)).sum().backward()
    found = flops(meter)
    assert all(got in (n * EACH, None) for n, got in zip(rows, found, strict=True))
    assert found.count(None) <= 4
    assert sum("counted" in record.left_out for record in meter.records) <= 24  # 4 sizes, of either kind


def test_without_a_batch_nothing_tells_it() -> None:
    model = Model()
    with Meter(model) as meter:
        for x in fed(ROWS):
            with meter.step():
                model.loss(x).backward()
        assert flops(meter) == [EACH * 2, *[None] * 9]
        assert any("whose inputs are not seen" in note for note in meter.summary().notes)
        for x in fed([4, 4, 2]):  # called at last: seen from the step after it on
            with meter.step():
                model(x).sum().backward()
        assert flops(meter)[-2:] == [EACH * 4, EACH * 2]


def test_a_ragged_last_batch_in_a_closure_is_counted_when_it_comes() -> None:
    """As Lightning steps: inside a closure a call that is new cannot be counted any more."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rows = [6, 6, 1] * 2
    with Meter(model) as meter:
        for x in meter.track(fed(rows), progress=False):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(x).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        assert flops(meter) == [EACH * n for n in rows]


def test_a_batch_tells_a_closure_that_calls_no_model() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rows = [2, 3, 5, 2, 5, 3, 2, 2, 5, 3] * 2
    with Meter(model) as meter:
        for x in meter.track(fed(rows), progress=False):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model.loss(x)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert all(found in (EACH * n, None) for n, found in zip(rows, flops(meter), strict=True))
        assert None not in flops(meter)[10:]


def test_what_runs_beside_equal_calls_of_one_step_is_told_by_their_number() -> None:
    """A product after the last of two micro-batches: their backward passes are otherwise the same."""
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps(meter: Meter, number: int) -> None:
        for _ in range(number):
            with meter.step():
                for _ in range(2):
                    model(torch.randn(3, 8)).sum().backward()
                model.weight.detach() @ model.weight.detach()
                optimizer.step()
                optimizer.zero_grad()

    with Meter(model) as meter:
        steps(meter, 6)
        expected = 2 * (2 * 2 * 3 * 64) + 2 * 8**3
        assert flops(meter) == [expected] * 6
        state = meter.state_dict()
    with Meter(model) as meter:
        meter.load_state_dict(state)
        steps(meter, 2)
        assert flops(meter) == [expected] * 8


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Container(list):  # type: ignore[type-arg]
    """A container with an attribute, which can be called as well."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x

    def __call__(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("kind", [Slotted, Container])
def test_what_a_batch_holds_is_looked_for(kind: Callable[[torch.Tensor], Slotted]) -> None:
    class Reads(Model):
        def forward(self, batch: Slotted) -> torch.Tensor:  # type: ignore[override]
            return self.layer(batch.x)

    model = Reads()
    with Meter(model) as meter:
        for x in fed(ROWS):
            with meter.step():
                model(kind(x)).sum().backward()
        assert flops(meter) == [EACH * n for n in ROWS]
