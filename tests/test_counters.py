"""Exceptions, early exits, counters within counters and in threads, and regions."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import flopprof
from conservation import conserved, counted, own, where
from flopprof import FlopCounter
from modules import (
    WIDTH,
    L,
    Recursive,
    Twice,
    both,
    leaf,
    linear,
    train,
)

# --- exceptions, early exits, and where the counter is opened -------------------------------------------------------


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.never = linear(), linear()
        self.failing = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        if self.failing:
            raise ValueError("no luck")
        return self.never(x)


def test_an_exception_in_forward_then_the_same_counter() -> None:
    model = nn.Sequential(linear(), Failing())
    counter = FlopCounter(model)
    with pytest.raises(ValueError, match="no luck"), counter:
        model(leaf())
    assert where(conserved(counter.profile)) == {"forward": {"0": L, "1.layer": L}}
    model[1].failing = False
    with counter:
        train(model)()
    assert where(conserved(counter.profile)) == {
        "forward": {"0": 2 * L, "1.layer": 2 * L, "1.never": L},
        "backward": {"0": 2 * L, "1.layer": 2 * L, "1.never": 2 * L},
    }


def test_an_exception_caught_inside_the_counter() -> None:
    model = nn.Sequential(linear(), Failing())
    with FlopCounter(model) as counter:
        with pytest.raises(ValueError, match="no luck"):
            model(leaf())
        leaf() @ torch.ones(WIDTH, WIDTH)
    assert where(conserved(counter.profile)) == {"forward": {"": L, "0": L, "1.layer": L}}


def test_an_exception_in_backward_then_the_same_counter() -> None:
    model = nn.Sequential(linear(), linear())

    def fail(_gradient: torch.Tensor) -> None:
        raise ValueError("no luck")

    with FlopCounter(model) as counter:
        hidden = model[0](leaf())
        hidden.register_hook(fail)
        with pytest.raises(ValueError, match="no luck"):
            model[1](hidden).sum().backward()
        train(model)()
    assert where(conserved(counter.profile)) == {
        "forward": {"0": 2 * L, "1": 2 * L},
        "backward": {"0": 2 * L, "1": 4 * L},
    }


def test_early_exit() -> None:
    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([linear(), linear(), linear()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x)
                if index == 1:
                    return x
            return x

    model = Exits()
    profile = counted(train(model), model=model)
    assert where(profile) == both({"layers.0": L, "layers.1": L})
    assert "layers.2" not in profile.by_module()


def test_generators_that_stop_midway() -> None:
    class Streaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: torch.Tensor) -> Any:
            while True:
                x = self.layer(x)
                yield x

    model = Streaming()
    with FlopCounter(model) as counter:
        stream = model(leaf())
        next(stream), next(stream)
    assert own(conserved(counter.profile), "forward") == {"layer": 2 * L}


def test_a_counter_opened_inside_a_forward() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inside, self.after = linear(), linear(), linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.before(x)
            with FlopCounter(self) as self.counter:
                x = self.inside(x)
            return self.after(x)

    model = nn.Sequential(Counting())
    train(model)()
    assert where(conserved(model[0].counter.profile)) == {"forward": {"inside": L}}


def test_a_counter_opened_inside_a_backward() -> None:
    counter = FlopCounter()

    class Opens(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            with counter:
                return gradient @ torch.eye(WIDTH)

    Opens.apply(leaf()).sum().backward()
    assert where(conserved(counter.profile)) == {"backward": {"": L}}


# --- several counters -----------------------------------------------------------------------------------------------


def test_counters_nest_each_with_its_own_names() -> None:
    inner_model = Twice()
    model = nn.Sequential(linear(), inner_model)
    with FlopCounter(model) as outer:
        hidden = model[0](leaf())
        with FlopCounter(inner_model) as inner:
            inner_model(hidden).sum().backward()
        train(model)()
    assert where(conserved(outer.profile)) == both({"0": 2 * L, "1.layer": 4 * L})
    assert where(conserved(inner.profile)) == {
        "forward": {"layer": 2 * L},
        "backward": {"": 2 * L, "layer": 4 * L},
    }


def test_a_counter_goes_on_with_its_tally() -> None:
    model = Twice()
    counter = FlopCounter(model)
    for times in (1, 2, 3):
        with counter as entered:
            assert entered is counter
            train(model)()
        assert where(conserved(counter.profile)) == both({"layer": 2 * L * times})
    counter.reset()
    assert counter.profile.hardware_flops == 0
    with counter:
        train(model)()
    assert where(conserved(counter.profile)) == both({"layer": 2 * L})


def test_a_counter_entered_within_itself_counts_once() -> None:
    model = Twice()
    counter = FlopCounter(model)
    with counter:
        with counter:
            train(model)()
        train(model)()
    assert where(conserved(counter.profile)) == both({"layer": 4 * L})
    assert {row.fqn: row.calls for row in counter.profile.modules} == {"": 2, "layer": 4}


def test_a_counter_entered_within_itself_around_another() -> None:
    model = Twice()
    outer, inner = FlopCounter(model), FlopCounter(model)
    with outer, inner, outer:
        train(model)()
    assert where(conserved(outer.profile)) == where(conserved(inner.profile)) == both({"layer": 2 * L})


def test_reset_is_for_a_closed_counter() -> None:
    with FlopCounter() as counter:
        with pytest.raises(RuntimeError, match="leave its `with` block first"):
            counter.reset()


def test_profile_while_open() -> None:
    model = Twice()
    with FlopCounter(model) as counter:
        assert counter.profile.hardware_flops == 0
        loss = model(leaf()).sum()
        assert where(conserved(counter.profile)) == {"forward": {"layer": 2 * L}}
        loss.backward()
        during = counter.profile
        assert where(conserved(during)) == both({"layer": 2 * L})
        train(model)()
    assert where(during) == both({"layer": 2 * L})
    assert where(counter.profile) == both({"layer": 4 * L})


def test_two_threads_with_a_counter_each() -> None:
    models = [Twice(), Recursive()]
    expected = [both({"layer": 2 * L * 10}), both({"layer": 3 * L * 10})]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait()
        with FlopCounter(models[index]) as counter:
            for _ in range(10):
                train(models[index])()
        found[index] = where(conserved(counter.profile))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected


def test_one_counter_used_by_one_thread_after_another() -> None:
    model = Twice()
    counter = FlopCounter(model)

    def work() -> None:
        with counter:
            train(model)()

    work()
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert where(conserved(counter.profile)) == both({"layer": 4 * 2 * L})


def test_a_counter_open_in_one_thread_is_refused_to_another() -> None:
    counter = FlopCounter()
    refused: list[str] = []

    def work() -> None:
        try:
            with counter:
                pass
        except RuntimeError as error:
            refused.append(str(error))

    with counter:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert refused == ["this FlopCounter is open in another thread: give each thread a counter of its own."]


# --- regions --------------------------------------------------------------------------------------------------------


def test_a_region_names_code_outside_modules() -> None:
    model = linear()
    with FlopCounter(model) as counter:
        output = model(leaf())
        with flopprof.region("loss"):
            loss = (output @ torch.ones(WIDTH, WIDTH)).sum()
        loss.backward()
    assert where(conserved(counter.profile)) == {
        "forward": {"": L, "loss": L},
        "backward": {"": 2 * L, "loss": L},
    }


def test_regions_nest_in_modules_and_in_each_other() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with flopprof.region("mix"):
                x = x @ torch.ones(WIDTH, WIDTH)
                with flopprof.region("deep"):
                    x = x @ torch.ones(WIDTH, WIDTH)
                return self.layer(x)

    model = nn.Sequential(Regions())
    profile = counted(train(model), model=model)
    assert where(profile) == {
        "forward": {"0.mix": L, "0.mix.deep": L, "0.layer": L},
        "backward": {"0.mix": L, "0.mix.deep": L, "0.layer": 2 * L},
    }


def test_a_region_without_a_counter_does_nothing_and_a_bad_name_says_so() -> None:
    with flopprof.region("loss"):
        pass
    for name in ("", "a.b"):
        with pytest.raises(ValueError, match="a word without dots"), flopprof.region(name):
            pass
