"""A meter stands before its models' calls and sees parameters frozen; else all is as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from flopprof import FlopCounter, Meter
from flopprof.counting.in_place import compiled_in_place
from flopprof.meter import watching
from two_layers import Net

SLOT = "_compiled_call_impl"
FIRST, SECOND = 2 * 8 * 16, 2 * 16 * 2  # per row, forward
EACH = 2 * FIRST + 3 * SECOND  # the input wants no gradient
FROZEN = FIRST + 2 * SECOND  # where the first layer's weight wants none, nor what comes of it


class Keeping(Net):
    """Copies of it have all that it has: torch's own `__getstate__` would leave out what stands before its call."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 8)


def train(call: Callable[[torch.Tensor], torch.Tensor], n: int = 3) -> None:
    call(rows(n)).square().mean().backward()


def flops(meter: Meter) -> list[int | None]:
    return [record.model_flops for record in meter.records]


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- before the call -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Net, Keeping])
def test_copies_have_nothing_before_their_calls(kind: type[Net]) -> None:
    model = kind()
    with Meter(model):
        for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
            assert vars(twin).get(SLOT) is None
            assert twin(rows(1)).shape == (1, 2)
    assert SLOT not in vars(model)


def test_nobody_takes_a_watched_model_for_a_compiled_one(fresh_dynamo: None) -> None:
    """Libraries ask for torch's attribute, and whether it is true."""
    model = Net()
    with Meter(model), Meter(model):
        assert not getattr(model, SLOT, False)
        model.compile(backend="eager")
        assert getattr(model, SLOT, False)
    assert isinstance(vars(model)[SLOT], type(torch.compile(lambda x: x, backend="eager")))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_meters_of_one_model_leave_in_any_order(order: tuple[int, ...]) -> None:
    model = Net()
    meters = [Meter(model) for _ in order]
    for left in order:
        for meter in meters:
            if not meter._closed:
                with meter.step():
                    train(model)
        meters[left].close()
    assert SLOT not in vars(model)
    assert [set(flops(meter)) for meter in meters] == [{3 * EACH}] * 3


@pytest.mark.parametrize("counted", [False, True])
def test_compiled_in_place_while_it_is_metered(counted: bool, fresh_dynamo: None) -> None:
    """Of every size, from the first time on: it is counted before the compiled call."""
    model, backend = Net(), CompileCounter()
    with Meter(model) as meter:
        for n in (3, 3, 3):
            with meter.step():
                train(model, n)
        if counted:
            with FlopCounter():
                model.compile(backend=backend, fullgraph=True, dynamic=False)
        else:
            model.compile(backend=backend, fullgraph=True, dynamic=False)
        for n in (3, 3, 3, 3, 5, 5, 5, 3, 5, 7):
            with meter.step():
                train(model, n)
        found = flops(meter)
    assert found == [n * EACH for n in (3, 3, 3, 3, 3, 3, 3, 5, 5, 5, 3, 5, 7)]
    assert backend.frame_count == 2  # the last size is counted, which runs eagerly
    assert compiled_in_place(model) is vars(model)[SLOT]
    train(model, 3)
    assert backend.frame_count == 2


def test_who_sets_torchs_attribute_takes_one_step(fresh_dynamo: None) -> None:
    model = Net()
    with Meter(model) as meter:
        for n in range(9):
            if n == 5:
                model._compiled_call_impl = None
            with meter.step():
                train(model)
        found = flops(meter)
    assert (found[:5], found[6:]) == ([3 * EACH] * 5, [3 * EACH] * 3)
    assert found[5] in (None, 3 * EACH)
    assert SLOT not in vars(model)


def test_a_replica_for_data_parallel_calls_itself() -> None:
    model = Net()
    with Meter(model):
        replica = model._replicate_for_data_parallel()
        assert vars(replica).get(SLOT) is None
        with pytest.raises(AttributeError, match="first"):  # its own parts: torch gives it copies of them later
            replica._modules.pop("first")
            replica(rows(1))


def test_a_model_whose_class_has_a_call_of_its_own() -> None:
    class Loud(Net):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    model = Loud()
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                train(model)
        assert flops(meter) == [3 * EACH] * 4


def test_what_the_call_raises_comes_through() -> None:
    model = Net()
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                train(model)
        with pytest.raises(RuntimeError, match="mat1 and mat2"), meter.step():
            model(torch.randn(3, 9))
        with meter.step():
            train(model)
        assert [record.left_out for record in meter.records][-2:] == [("failed", "counted"), ()]


def test_calls_of_another_thread_go_through() -> None:
    model, found = Net(), []
    with Meter(model) as meter:
        for _ in range(5):
            with meter.step():
                thread = threading.Thread(target=lambda: found.append(model(rows(7)).shape))
                thread.start()
                thread.join()
                train(model)
        assert set(flops(meter)) == {3 * EACH}
        assert {record.calls for record in meter.records} == {1}
    assert found == [(7, 2)] * 5


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_other_forms_of_a_metered_model(fresh_dynamo: None) -> None:
    model, x = Net(), rows(3)
    expected = model(x)
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                train(model)
        for form in (
            torch.jit.script(model),
            torch.jit.trace(model, (x,)),
            torch.fx.symbolic_trace(model),
            torch.export.export(model, (x,)).module(),
            torch.compile(model, backend="eager", fullgraph=True),
            copy.deepcopy(torch.fx.symbolic_trace(model)),
        ):
            assert torch.allclose(form(x), expected)
        for _ in range(3):
            with meter.step():
                train(model)
        assert set(flops(meter)) == {3 * EACH}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_a_scripted_model_is_metered() -> None:
    model = torch.jit.script(Net())
    with Meter(model) as meter:
        for n in (3, 3, 3, 5, 5):
            with meter.step():
                train(model, n)
        assert flops(meter) == [n * EACH for n in (3, 3, 3, 5, 5)]


def test_a_model_that_keeps_its_meter_is_freed() -> None:
    model = Net()
    object.__setattr__(model, "meter", Meter(model))
    with model.meter.step():  # type: ignore[operator, union-attr]
        train(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- frozen and thawed -----------------------------------------------------------------------------------------------
def by_assigning(model: Net, wants: bool) -> None:
    model.first.weight.requires_grad = wants


def by_method(model: Net, wants: bool) -> None:
    model.first.weight.requires_grad_(wants)


def by_module(model: Net, wants: bool) -> None:
    model.first.requires_grad_(wants)


def by_detaching(model: Net, wants: bool) -> None:
    if wants:
        model.first.weight.requires_grad_()
    else:
        model.first.weight.detach_()


def in_another_thread(model: Net, wants: bool) -> None:
    thread = threading.Thread(target=by_module, args=(model, wants))
    thread.start()
    thread.join()


class Low(nn.Parameter):
    """A parameter of a class of its own."""


@pytest.mark.parametrize("kind", [nn.Parameter, Low])
@pytest.mark.parametrize("freeze", [by_assigning, by_method, by_module, by_detaching, in_another_thread])
def test_frozen_and_thawed_while_steps_repeat(freeze: Callable[[Net, bool], None], kind: type[nn.Parameter]) -> None:
    model = Net()
    model.first.weight = kind(model.first.weight.detach())
    wanted = [True] * 5 + [False] * 5 + [True] * 2 + [False] * 1 + [True] * 3
    with Meter(model) as meter:
        for before, now in zip([True, *wanted], wanted, strict=False):
            if now is not before:
                freeze(model, now)
            with meter.step():
                train(model)
        found = flops(meter)
    assert found == [3 * (EACH if now else FROZEN) for now in wanted]


def test_frozen_within_a_step() -> None:
    """As adversarial training does, between two calls."""
    model = Net()
    with Meter(model) as meter:
        for _ in range(6):
            with meter.step():
                train(model)
                model.first.requires_grad_(False)
                train(model)
                model.first.requires_grad_(True)
        assert flops(meter) == [3 * (EACH + FROZEN)] * 6


def test_a_parameter_is_what_it_was() -> None:
    weight = nn.Parameter(torch.randn(2, 2))
    with Meter(Net()) as meter:
        with meter.step():
            train(meter.models[0])
        assert weight.requires_grad is True
        assert weight.requires_grad_(False) is weight
        assert not weight.requires_grad_(requires_grad=False).requires_grad
        weight.requires_grad = True
        assert copy.deepcopy(weight).requires_grad
        assert pickle.loads(pickle.dumps(weight)).requires_grad
        with pytest.raises(RuntimeError, match="floating point"):
            nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False).requires_grad_()
        with pytest.raises(TypeError):
            weight.requires_grad_(1, 2)
        with pytest.raises((TypeError, RuntimeError)):
            weight.requires_grad = "yes"  # type: ignore[assignment]
    assert "requires_grad" not in vars(nn.Parameter)


def test_a_compiled_function_freezes(fresh_dynamo: None) -> None:
    model, backend = Net(), CompileCounter()

    @torch.compile(backend=backend, fullgraph=True)
    def loss(x: torch.Tensor) -> torch.Tensor:
        y = model(x).square().mean()
        return y * 2 if model.first.weight.requires_grad else y

    with Meter(model) as meter:
        for frozen in (False, False, False, True, True, True):
            model.first.weight.requires_grad = not frozen
            with meter.step(rows(3)):
                loss(rows(3)).backward()
        found = flops(meter)
    assert all(got in (3 * each, None) for got, each in zip(found, [EACH] * 3 + [FROZEN] * 3, strict=True))
    assert backend.frame_count == 2


# --- what others do with modules -------------------------------------------------------------------------------------
class Copying(Net):
    """Its copies share all that it has, without torch's knowing."""

    def __copy__(self) -> Copying:
        twin = Copying.__new__(Copying)
        twin.__dict__.update(self.__dict__)
        twin._modules = {name: copy.deepcopy(part) for name, part in self._modules.items()}
        return twin


@pytest.mark.parametrize("closed", [False, True])
def test_a_clone_that_took_all_the_model_has_runs_itself(closed: bool) -> None:
    model = Copying()
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                train(model)
        twin = copy.copy(model)
        torch.nn.init.zeros_(twin.first.weight)
        if closed:
            meter.close()
        else:
            with meter.step():
                train(model)
                assert not twin(rows(2)).any()
        assert not twin(rows(2)).any()
        assert model(rows(2)).any()
        assert set(flops(meter)) <= {3 * EACH, 3 * EACH + 2 * (FIRST + SECOND), None}
    assert SLOT not in vars(twin)


def test_whose_call_it_is_is_looked_up_where_somebody_else_holds_what_tells_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(watching, "_frame", lambda depth: looked.append(depth) or sys._getframe(depth + 1))
    model = Net()
    with Meter(model):
        train(model)
        assert not looked
        held = vars(model)[SLOT]
        train(model)
        assert len(looked) == 1
        del held
        train(model)
        assert len(looked) == 1


def test_a_call_of_the_users_own_is_compiled(fresh_dynamo: None) -> None:
    class Own(Net):
        def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
            return super()._call_impl(*args, **kwargs) * 2

    model, x = Own(), rows(3)
    expected = model(x)
    with Meter(model):
        model.compile(backend="eager")
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("how", ["forward hook", "pre-hook", "pre-hook, itself", "call", "called by name"])
def test_a_metered_model_inside_what_is_compiled(how: str, fresh_dynamo: None) -> None:
    class Calls(Net):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    model, backend = Calls() if how == "call" else Net(), CompileCounter()
    if how == "forward hook":
        model.register_forward_hook(lambda _module, _args, result: result * 2)
    if "pre-hook" in how:
        model.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    call = model.__call__ if how == "called by name" else model
    compiled = torch.compile(lambda x: call(x) + 1, backend=backend, fullgraph=True)
    if "itself" in how:
        whole = torch.compile(model, backend=backend, fullgraph=True)
        compiled = lambda x: whole(x) + 1  # noqa: E731
    x = rows(3)
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step(x):
                compiled(x).sum().backward()
        found = flops(meter)
    assert torch.equal(compiled(x), call(x) + 1)
    assert backend.frame_count <= 2
    assert all(got in (3 * EACH, None) for got in found)


@pytest.mark.parametrize("first", [False, True])
def test_a_pre_hook_that_takes_fewer_rows(first: bool) -> None:
    """Whether it was put there before the meter or after it."""
    model = Net()
    taken = [5]

    def fewer(_module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0][: taken[0]],)

    if first:
        model.register_forward_pre_hook(fewer)
    with Meter(model) as meter:
        if not first:
            model.register_forward_pre_hook(fewer)
        for n in (5, 5, 5, 5, 2, 2, 5, 7, 7, 2):
            taken[0] = n
            with meter.step():
                train(model, 8)
        found = flops(meter)
    assert found == [n * EACH for n in (5, 5, 5, 5, 2, 2, 5, 7, 7, 2)]
    assert len(model._forward_pre_hooks) == 1


def test_a_pre_hook_that_freezes() -> None:
    model, freeze = Net(), [False]
    model.register_forward_pre_hook(lambda module, _: module.first.requires_grad_(not freeze[0]) and None)  # type: ignore[operator, union-attr, func-returns-value]
    wanted = [True] * 5 + [False] * 3 + [True] * 2
    with Meter(model) as meter:
        for now in wanted:
            freeze[0] = not now
            with meter.step():
                train(model)
        assert flops(meter) == [3 * (EACH if now else FROZEN) for now in wanted]


@pytest.mark.parametrize("tracked", [False, True])
def test_a_part_of_what_is_compiled_in_place(tracked: bool, fresh_dynamo: None) -> None:
    """Its calls are seen only where they are counted, which is eagerly."""
    outer = nn.Sequential(Net(), nn.Linear(2, 2, bias=False))
    outer.compile(backend="eager")
    with Meter(outer[0]) as meter:
        for n in (3, 3, 3, 5, 5, 3, 3):
            x = rows(n)
            with meter.step(x if tracked else None):
                outer(x).square().mean().backward()
        found = flops(meter)
    each = EACH + 3 * 2 * 2 * 2
    if tracked:
        assert found[1:] == [n * each for n in (3, 3, 5, 5, 3, 3)]
    assert all(got in (n * each, None) for got, n in zip(found, (3, 3, 3, 5, 5, 3, 3), strict=True))


def test_uncompiling_by_hand(fresh_dynamo: None) -> None:
    model = Net()
    with Meter(model) as meter:
        model.compile(backend="eager")
        for n in range(12):
            if n == 6:
                model._compiled_call_impl = None
            with meter.step():
                train(model)
        found = flops(meter)
    assert found[:6] + found[8:] == [3 * EACH] * 10
    assert set(found[6:8]) <= {3 * EACH, None}


def test_backward_passes_in_keywords() -> None:
    """As Megatron starts them."""
    model = Net()
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                loss = model(rows(3)).square().mean()
                torch.autograd.Variable._execution_engine.run_backward(
                    tensors=(loss,), grad_tensors=(torch.ones(()),), keep_graph=False, create_graph=False, inputs=(),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
        assert flops(meter) == [3 * EACH] * 4


def test_a_subclass_whose_flag_compiled_code_reads(fresh_dynamo: None) -> None:
    class Reading(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y * 2 if self.first.weight.requires_grad else y

    model = Reading()
    model.first.weight = Low(model.first.weight.detach())
    with Meter(model) as meter:
        call = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(4):
            with meter.step():
                train(call)
        assert set(flops(meter)) <= {3 * EACH, None}


def test_who_patches_over_it_keeps_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        with Meter(Net()) as meter:
            with meter.step():
                train(meter.models[0])
            mine = lambda self, *_: self  # noqa: E731
            patch.setattr(nn.Parameter, "requires_grad_", mine)
        assert vars(nn.Parameter)["requires_grad_"] is mine
    del nn.Parameter.requires_grad_


def test_a_meter_that_is_closed_while_its_model_is_called() -> None:
    model = Net()
    meter = Meter(model)
    model.first.register_forward_pre_hook(lambda *_: meter.close())
    assert model(rows(2)).shape == (2, 2)
    assert SLOT not in vars(model)
