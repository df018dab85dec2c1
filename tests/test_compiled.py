"""Compiled, exported, scripted and traced models are counted as what they stand for, and stay what they are."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap

import flopprof
from flopprof import FlopCounter, Profile
from flopprof.counting.compiled import run_eagerly

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

BATCH, INNER = 3, 8
EACH = 2 * BATCH * 4 * INNER  # one of the two layers, forward
FORWARD = {"": 0, "a": EACH, "b": EACH}
BACKWARD = {"": 0, "a": EACH, "b": 2 * EACH}  # the input wants no gradient


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, INNER)
        self.b = nn.Linear(INNER, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, 4)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(run: Callable[[], Any], model: nn.Module | None = None) -> Profile:
    with FlopCounter(model) as counter:
        run()
    assert counter.profile.exact
    return counter.profile


def own(profile: Profile, phase: Any) -> dict[str, int]:
    return {name: flops for name, flops in profile.by_module(phase, own=True).items() if name != "_guards_fn"}


# --- torch.compile --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_compiled_model_is_counted_by_module_and_stays_compiled(
    x: torch.Tensor, *, fullgraph: bool, before: bool
) -> None:
    backend = CompileCounter()
    model = Two()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    if before:
        compiled(x)
    profile = counted(lambda: compiled(x).sum().backward(), model)
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == BACKWARD
    assert backend.frame_count == int(before)
    for _ in range(2):
        compiled(x)
    assert backend.frame_count == 1


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_compiled_wrapper_names_its_modules_as_the_model_does(x: torch.Tensor, *, fullgraph: bool) -> None:
    compiled = torch.compile(Two(), backend="eager", fullgraph=fullgraph)
    assert own(counted(lambda: compiled(x), compiled), "forward") == FORWARD


@pytest.mark.parametrize("before", [False, True])
def test_module_compile_in_place(x: torch.Tensor, *, before: bool) -> None:
    backend = CompileCounter()
    model = Two()
    model.compile(backend=backend, fullgraph=True)
    if before:
        model(x)
    compiled = model._compiled_call_impl
    profile = counted(lambda: model(x).sum().backward(), model)
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == BACKWARD
    assert model._compiled_call_impl is compiled
    assert "_compiled_call_impl" in vars(nn.Module)
    assert nn.Module._compiled_call_impl is None
    for _ in range(2):
        model(x)
    assert backend.frame_count == 1


def test_one_layer_compiled_in_place(x: torch.Tensor) -> None:
    backend = CompileCounter()
    model = Two()
    model.a.compile(backend=backend)
    for _ in range(2):
        assert own(counted(lambda: model(x), model), "forward") == FORWARD
        model(x)
    assert backend.frame_count == 1


def test_compiling_in_place_under_a_counter_outlives_it(x: torch.Tensor) -> None:
    backend = CompileCounter()
    model = Two()
    with FlopCounter(model) as counter:
        model.compile(backend=backend, fullgraph=True)
        model(x)
    assert own(counter.profile, "forward") == FORWARD
    assert backend.frame_count == 0
    for _ in range(2):
        model(x)
    assert backend.frame_count == 1


def test_a_compiled_function(x: torch.Tensor) -> None:
    w = torch.randn(4, 5, requires_grad=True)

    @torch.compile(backend="eager", fullgraph=True)
    def product(x: torch.Tensor) -> torch.Tensor:
        return (x @ w).sin()

    product(x)
    assert counted(lambda: product(x).sum().backward()).by_phase() == {
        "forward": 2 * BATCH * 4 * 5, "backward": 2 * BATCH * 4 * 5, "recompute": 0, "optimizer": 0,
    }  # fmt: skip


@contextmanager
def another_thread_counting() -> Iterator[FlopCounter]:
    counter, ready, done = FlopCounter(), threading.Event(), threading.Event()

    def hold() -> None:
        with counter:
            torch.ones(2, 3) @ torch.ones(3, 4)
            ready.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(60)
    try:
        yield counter
    finally:
        done.set()
        thread.join()


def test_compiling_for_the_first_time_while_another_thread_counts(x: torch.Tensor) -> None:
    whole, in_place = CompileCounter(), CompileCounter()
    compiled, model = torch.compile(Two(), backend=whole, fullgraph=True), Two()
    with another_thread_counting() as counter:
        compiled(x)
        model.compile(backend=in_place, fullgraph=True)
        model(x)
        assert (whole.frame_count, in_place.frame_count) == (1, 1)
    assert counter.profile.hardware_flops == 2 * 2 * 3 * 4
    for _ in range(3):
        compiled(x)
        model(x)
    # Module's own call is another code than under a counter, and is compiled once for itself.
    assert max(whole.frame_count, in_place.frame_count) <= 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_backward_under_the_counter_of_a_forward_that_ran_compiled_before_it(x: torch.Tensor, backend: str) -> None:
    loss = torch.compile(Two(), backend=backend)(x).sum()
    profile = counted(loss.backward)
    assert profile.by_phase() == {"forward": 0, "backward": 3 * EACH, "recompute": 0, "optimizer": 0}
    assert profile.by_module("backward", own=True) == {"": 3 * EACH}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_counter_inside_a_compiled_function_counts(x: torch.Tensor) -> None:
    w = torch.randn(4, 5)

    @torch.compile(backend="eager")
    def run(x: torch.Tensor) -> int:
        with FlopCounter() as counter:
            x @ w
        return counter.profile.forward_flops

    assert run(x) == 2 * BATCH * 4 * 5


def test_a_counter_does_not_import_the_compiler() -> None:
    program = """
import sys
import torch
from flopprof import FlopCounter
product = lambda x: x @ x
with FlopCounter() as counter:
    product(torch.ones(2, 2))
    assert "torch._dynamo" not in sys.modules
    torch.compile(product, backend="eager", fullgraph=True)(torch.ones(2, 2))
    switch = sys.modules["torch._dynamo.eval_frame"]._is_eager_on_nested_compile
assert counter.profile.forward_flops == 2 * 16
assert sys.modules["torch._dynamo.eval_frame"]._is_eager_on_nested_compile is not switch
assert not any(type(finder).__module__.startswith("flopprof") for finder in sys.meta_path)
with FlopCounter():
    pass
assert not any(type(finder).__module__.startswith("flopprof") for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_older_torch_asks_the_stance(x: torch.Tensor) -> None:
    """Where torch has no switch for nested compiles, the callback that would compile is withheld."""
    import torch._dynamo.eval_frame as dynamo

    class Older:
        @staticmethod
        def _callback_from_stance(callback: Any) -> Any:
            return callback

    counting = [True]
    change = run_eagerly(lambda: counting[0])
    undo = change._change(Older)  # type: ignore[arg-type]
    assert Older._callback_from_stance("compile") is None
    counting[0] = False
    assert Older._callback_from_stance("compile") == "compile"
    undo()
    assert vars(Older)["_callback_from_stance"].__func__("compile") == "compile"
    assert hasattr(dynamo, "_callback_from_stance")


# --- other forms of a model -----------------------------------------------------------------------------------------
def test_exported_programs(x: torch.Tensor) -> None:
    program = torch.export.export(Two(), (x,))
    for exported in (program.module(), program.run_decompositions().module()):
        profile = counted(lambda: exported(x).sum().backward(), exported)
        # Its graph is flat: the modules of before are parameters' names only.
        assert own(profile, "forward") == {"": 2 * EACH}
        assert own(profile, "backward") == {"": 3 * EACH}


@pytest.mark.parametrize("form", ["script", "trace", "warm trace"])
def test_scripted_and_traced_modules(x: torch.Tensor, form: str) -> None:
    model: Any = torch.jit.script(Two()) if form == "script" else torch.jit.trace(Two(), (x,))
    if form == "warm trace":  # the interpreter optimises what it has seen twice
        for _ in range(3):
            model(x).sum().backward()
    profile = counted(lambda: model(x).sum().backward(), model)
    assert own(profile, "forward") == {"": 2 * EACH}
    assert own(profile, "backward") == {"": 3 * EACH}


def test_scripting_under_a_counter(x: torch.Tensor) -> None:
    assert counted(lambda: torch.jit.script(Two())(x)).forward_flops == 2 * EACH


def test_frozen_script(x: torch.Tensor) -> None:
    model = torch.jit.optimize_for_inference(torch.jit.script(Two().eval()))
    assert counted(lambda: [model(x) for _ in range(3)]).forward_flops == 3 * 2 * EACH


def test_symbolically_traced_modules_keep_their_names(x: torch.Tensor) -> None:
    model = torch.fx.symbolic_trace(Two())
    profile = counted(lambda: model(x).sum().backward(), model)
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == BACKWARD


@pytest.mark.filterwarnings("ignore:.*imbalance.*", "ignore:.*DataParallel.*")
def test_data_parallel_wrapper_has_no_name(x: torch.Tensor) -> None:
    model = nn.DataParallel(Two())
    profile = counted(lambda: model(x).sum().backward(), model)
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == BACKWARD


def test_meta_models() -> None:
    model = Two().to("meta")
    profile = counted(lambda: model(torch.empty(BATCH, 4, device="meta")).sum().backward(), model)
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == BACKWARD


@pytest.mark.parametrize("order", ["fake mode inside", "fake mode outside", "fake tensors alone"])
def test_fake_tensors_are_counted_once(order: str) -> None:
    with FakeTensorMode():
        model, x = Two(), torch.randn(BATCH, 4)
        outside = FlopCounter(model)
        if order == "fake mode outside":
            with outside:
                model(x).sum().backward()
    if order == "fake tensors alone":
        with outside:
            model(x).sum().backward()
    if order == "fake mode inside":
        with outside, FakeTensorMode():
            other = Two()
            other(torch.randn(BATCH, 4)).sum().backward()
        assert outside.profile.by_phase()["forward"] == 2 * EACH
        assert outside.profile.by_phase()["backward"] == 3 * EACH
    else:
        assert own(outside.profile, "forward") == FORWARD
        assert own(outside.profile, "backward") == BACKWARD


def test_vmap_over_modules(x: torch.Tensor) -> None:
    base = Two()
    ensemble = [Two() for _ in range(5)]
    parameters, _buffers = stack_module_state(ensemble)

    def call(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return functional_call(base, parameters, (x,))

    assert own(counted(lambda: vmap(call, (0, None))(parameters, x), base), "forward") == {
        name: 5 * flops for name, flops in FORWARD.items()
    }
    assert counted(lambda: vmap(base)(torch.randn(7, BATCH, 4)), base).forward_flops == 7 * 2 * EACH


def test_gradients_per_sample() -> None:
    model = Two()

    def loss(parameters: Any, sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (sample,)).sum()

    samples = torch.randn(BATCH, 4)
    parameters = dict(model.named_parameters())
    profile = counted(lambda: vmap(grad(loss), (None, 0))(parameters, samples), model)
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == BACKWARD


def test_a_compiled_part_without_a_length() -> None:
    block = torch.compile(nn.Linear(4, 4), backend="eager")
    net = nn.Sequential(nn.Linear(4, 4), block)
    x = torch.randn(BATCH, 4)
    flops = 2 * 2 * BATCH * 4 * 4
    assert counted(lambda: net(x)).forward_flops == flops
    assert counted(lambda: net(x), net).by_module("forward") == {"": flops, "0": flops // 2, "1": flops // 2}
    assert flopprof.count(net, x).n_params == 2 * (4 * 4 + 4)
