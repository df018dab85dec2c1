"""Operators of others: seen through, counted by a registered formula, or named as uncounted; never silently 0."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flopprof import FlopCounter, Profile, register_formula
from flopprof.counting.operators import entries
from flopprof.formulas import RULES, SEEN_THROUGH

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

PRODUCT = 2 * 3 * 4 * 5  # (3, 4) @ (4, 5)
OUTSIDE = "its output was produced outside the dispatcher"


def counted(run: Callable[[], Any], model: nn.Module | None = None) -> Profile:
    with FlopCounter(model) as counter:
        run()
    return counter.profile


def operands(*, gradient: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4, requires_grad=gradient), torch.randn(4, 5, requires_grad=gradient)


@pytest.fixture
def own_formulas() -> Iterator[None]:
    """Formulas registered in a test are gone after it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)
    register_formula("flopprof_test::nothing")(lambda *_, out: 0)  # tells tables of rules that they are old
    del RULES["flopprof_test::nothing"]
    entries()


# --- operators ------------------------------------------------------------------------------------------------------
@torch.library.custom_op("flopprof_test::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b).sin()


@product.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = ctx.saved_tensors
    return grad @ b.T, a.T @ grad


product.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("flopprof_test::compiled", mutates_args=())
def compiled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Stands in for a kernel that calls no torch operator."""
    return torch.from_numpy(a.detach().numpy() @ b.detach().numpy())


@torch.library.custom_op("flopprof_test::in_place", mutates_args={"a"})
def in_place(a: torch.Tensor, b: torch.Tensor) -> None:
    a.copy_(a @ b)


LIBRARY = torch.library.Library("flopprof_library", "DEF")
for _name, _key in (
    ("explicit", "CompositeExplicitAutograd"),
    ("cpu", "CPU"),
    ("implicit", "CompositeImplicitAutograd"),
):
    LIBRARY.define(f"{_name}(Tensor a, Tensor b) -> Tensor")
    LIBRARY.impl(_name, lambda a, b: a @ b, _key)
LIBRARY.define("many(Tensor[] a, Tensor b) -> Tensor[]")
LIBRARY.impl("many", lambda a, b: [item @ b for item in a], "CPU")


def test_custom_operator_is_seen_through_forward_and_backward() -> None:
    a, b = operands(gradient=True)
    profile = counted(lambda: product(a, b).sum().backward())
    assert profile.by_phase() == {"forward": PRODUCT, "backward": 2 * PRODUCT, "recompute": 0, "optimizer": 0}
    assert profile.exact
    assert "flopprof_test::product" not in profile.by_operator()


def test_custom_operator_under_inference_mode() -> None:
    with torch.inference_mode():
        assert counted(lambda: product(*operands())).forward_flops == PRODUCT


def test_custom_operator_belongs_to_its_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.randn(4, 5))

        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return product(a, self.b)

    model = nn.Sequential(Holder(), nn.Linear(5, 2, bias=False))
    profile = counted(lambda: model(torch.randn(3, 4)).sum().backward(), model)
    assert profile.by_module("forward", own=True) == {"": 0, "0": PRODUCT, "1": 2 * 3 * 5 * 2}
    assert profile.by_module("backward", own=True) == {"": 0, "0": 2 * PRODUCT, "1": 2 * 2 * 3 * 5 * 2}


def test_mutating_operator() -> None:
    profile = counted(lambda: in_place(torch.ones(4, 4), torch.ones(4, 4)))
    assert profile.forward_flops == 2 * 4 * 4 * 4
    assert profile.exact


@pytest.mark.parametrize("name", ["explicit", "cpu", "implicit"])
@pytest.mark.parametrize("inference", [False, True])
def test_library_kernels(name: str, *, inference: bool) -> None:
    with torch.inference_mode(inference):
        profile = counted(lambda: getattr(torch.ops.flopprof_library, name)(*operands()))
    assert profile.forward_flops == PRODUCT
    assert profile.exact


def test_library_kernel_of_lists() -> None:
    a, b = operands()
    assert counted(lambda: torch.ops.flopprof_library.many([a] * 3, b)).forward_flops == 3 * PRODUCT


def test_triton_operator() -> None:
    if not hasattr(torch.library, "triton_op"):
        pytest.skip("this torch has no triton_op")

    @torch.library.triton_op("flopprof_test::triton", mutates_args={})
    def on_triton(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    profile = counted(lambda: on_triton(*operands()))
    assert profile.forward_flops == PRODUCT
    assert profile.exact


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operator_without_torch_operators_inside_is_uncounted_and_named(device: str) -> None:
    # A fake kernel shows nothing of what the real one does.
    operator = compiled if device == "cpu" else product
    a, b = (tensor.to(device) for tensor in operands())
    profile = counted(lambda: [operator(a, b) for _ in range(2)])
    assert profile.uncounted == {"flopprof_test::compiled" if device == "cpu" else "flopprof_test::product": 2}
    (row,) = profile.uncounted_rows
    assert (row.fqn, row.phase, row.shapes) == ("", "forward", ((3, 4), (4, 5)))
    assert row.reason == "no formula, and no counted operator inside"
    assert not profile.exact


# --- formulas -------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("own_formulas")
def test_registered_formula_counts_an_operator_and_can_be_replaced() -> None:
    a, b = operands()

    @register_formula("flopprof_test::compiled")
    def once(a: Any, b: Any, *, out: Any) -> int:
        return 2 * a.shape[0] * a.shape[1] * out.shape[1]

    profile = counted(lambda: compiled(a, b))
    assert profile.by_operator() == {"flopprof_test::compiled": PRODUCT}
    assert profile.exact

    @register_formula("flopprof_test::compiled", replace=True)
    def twice(a: Any, b: Any, *, out: Any) -> int:
        return 2 * once(a, b, out=out)

    assert counted(lambda: compiled(a, b)).forward_flops == 2 * PRODUCT


@pytest.mark.usefixtures("own_formulas")
def test_registered_formula_comes_before_looking_inside() -> None:
    register_formula("flopprof_test::product")(lambda a, b, *, out: 7)
    assert counted(lambda: product(*operands())).by_operator() == {"flopprof_test::product": 7}


@pytest.mark.usefixtures("own_formulas")
@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "TypeError: 'NoneType' object cannot be interpreted as an integer"),
        (2.5, "TypeError: 'float' object cannot be interpreted as an integer"),
        (-5, "ValueError: -5 FLOPs are less than none"),
        (ZeroDivisionError("of what?"), "ZeroDivisionError: of what?"),
    ],
)
def test_formula_that_fails_leaves_its_operator_uncounted(result: Any, reason: str) -> None:
    @register_formula("flopprof_test::compiled")
    def broken(a: Any, b: Any, *, out: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    a, b = operands()
    with FlopCounter() as counter:
        out = compiled(a, b)
    assert torch.equal(out, compiled(a, b))
    (row,) = counter.profile.uncounted_rows
    assert (row.op, row.reason) == ("flopprof_test::compiled", f"its formula failed: {reason}")
    assert counter.profile.hardware_flops == 0


@pytest.mark.usefixtures("own_formulas")
def test_formula_may_return_an_integer_of_numpy() -> None:
    register_formula("flopprof_test::compiled")(lambda a, b, *, out: np.prod([2, *a.shape, b.shape[1]]))
    (row,) = counted(lambda: compiled(*operands())).operators
    assert row.flops == PRODUCT
    assert type(row.flops) is int


# --- autograd.Function ----------------------------------------------------------------------------------------------
class Extension(torch.autograd.Function):
    """Stands for a compiled extension: nothing of it reaches the dispatcher, forward or backward."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return torch.from_numpy(a.detach().numpy() @ b.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a, b = (tensor.detach().numpy() for tensor in ctx.saved_tensors)
        return torch.from_numpy(grad.numpy() @ b.T), torch.from_numpy(a.T @ grad.numpy())


class FillsWhatItAllocates(torch.autograd.Function):
    """As most extensions: torch allocates the result, a kernel fills it. The backward is of torch operators."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        out = a.new_empty(a.shape[0], b.shape[1])
        out.numpy()[:] = a.detach().numpy() @ b.detach().numpy()
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a, b = ctx.saved_tensors
        return grad @ b.T, a.T @ grad


def test_extension_behind_a_function_is_named_forward_and_backward() -> None:
    a, b = operands(gradient=True)
    profile = counted(lambda: Extension.apply(a, b).sum().backward())
    assert [(row.op, row.phase, row.shapes, row.reason) for row in profile.uncounted_rows] == [
        ("Extension", "forward", ((3, 4), (4, 5)), OUTSIDE),
        ("Extension", "backward", ((3, 5),), OUTSIDE),
    ]
    assert profile.hardware_flops == 0


def test_extension_whose_backward_is_seen() -> None:
    a, b = operands(gradient=True)
    profile = counted(lambda: FillsWhatItAllocates.apply(a, b).sum().backward())
    assert [(row.op, row.phase) for row in profile.uncounted_rows] == [("FillsWhatItAllocates", "forward")]
    assert profile.by_phase() == {"forward": 0, "backward": 2 * PRODUCT, "recompute": 0, "optimizer": 0}


def test_extension_belongs_to_its_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.randn(4, 5))

        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return Extension.apply(a, self.b)

    model = nn.Sequential(Holder(), nn.Linear(5, 2))
    profile = counted(lambda: model(torch.randn(3, 4)).sum().backward(), model)
    assert [(row.fqn, row.phase) for row in profile.uncounted_rows] == [("0", "forward"), ("0", "backward")]


def test_backward_of_an_extension_after_the_counter_is_nobodys() -> None:
    a, b = operands(gradient=True)
    with FlopCounter() as counter:
        loss = Extension.apply(a, b).sum()
    loss.backward()
    assert counter.profile.uncounted == {"Extension": 1}
    assert b.grad is not None


def test_module_that_calls_an_extension_is_named() -> None:
    class Direct(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(x.detach().numpy() @ np.ones((4, 5), np.float32))

    model = nn.Sequential(Direct(), nn.Linear(5, 2))
    profile = counted(lambda: model(torch.randn(3, 4)), model)
    assert [(row.op, row.fqn, row.reason) for row in profile.uncounted_rows] == [("Direct", "0", OUTSIDE)]
    assert profile.forward_flops == 2 * 3 * 5 * 2


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """An autograd.Function of these."""
    return type(
        "Quiet", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def _scatter(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3, 4).index_add_(0, torch.tensor([0, 2]), grad)


def _dirty(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    ctx.mark_dirty(x)
    return x.mul_(2)


CONSTANT = torch.ones(3, 4)
QUIET: dict[str, Any] = {
    "identity": function(lambda ctx, x: x, lambda ctx, g: g),
    "view": function(lambda ctx, x: x.view(-1), lambda ctx, g: g.view(3, 4)),
    "transpose": function(lambda ctx, x: x.t(), lambda ctx, g: g.t()),
    "clone": function(lambda ctx, x: x.clone(), lambda ctx, g: g.clone()),
    "gather": function(lambda ctx, x: x[torch.tensor([0, 2])], _scatter),
    "in place": function(_dirty, lambda ctx, g: 2 * g),
    "constant": function(lambda ctx, x: CONSTANT.clone(), lambda ctx, g: torch.zeros(3, 4)),
    "filled": function(lambda ctx, x: torch.full((2,), 3.0), lambda ctx, g: g.new_zeros(3, 4)),
    "cast": function(lambda ctx, x: x.double(), lambda ctx, g: g.float()),
    "no gradient": function(lambda ctx, x: x.exp(), lambda ctx, g: None),
}


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("wrapped", ["bare", "module", "checkpoint", "reentrant checkpoint"])
def test_functions_that_multiply_nothing_raise_no_alarm(name: str, wrapped: str) -> None:
    class Holder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return QUIET[name].apply(1 * x)

    model = nn.Sequential(nn.Identity(), Holder())

    def run() -> None:
        x = torch.randn(3, 4, requires_grad=True) * 1
        if wrapped == "bare":
            out = QUIET[name].apply(x)
        elif wrapped == "module":
            out = model(x)
        else:
            out = checkpoint(model, x, use_reentrant=wrapped.startswith("reentrant"))
        out.sum().backward()

    profile = counted(run)
    assert profile.exact
    assert profile.hardware_flops == 0


def test_modules_that_return_what_they_hold_raise_no_alarm() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameter = nn.Parameter(torch.randn(3))
            self.register_buffer("buffer", torch.randn(3))
            self.cache = [torch.randn(3)]

        def forward(self, x: torch.Tensor) -> Any:
            return self.parameter, self.buffer, self.cache[0], {"x": x, "n": 3, "row": x[0]}

    assert counted(lambda: Holds()(torch.randn(3, 4))).exact


def test_function_of_torch_operators_is_counted_not_named() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            a, b = ctx.saved_tensors
            return grad @ b.T, a.T @ grad

    a, b = operands(gradient=True)
    profile = counted(lambda: Product.apply(a, b).sum().backward())
    assert profile.by_phase() == {"forward": PRODUCT, "backward": 2 * PRODUCT, "recompute": 0, "optimizer": 0}
    assert profile.exact


def test_what_is_seen_through_has_no_formula() -> None:
    assert not SEEN_THROUGH & set(RULES)


@pytest.mark.parametrize("limit", [4, None])
def test_what_a_cache_remembers_from_an_earlier_call_costs_nothing(limit: int | None) -> None:
    class Ruler(nn.Module):
        @functools.lru_cache(maxsize=limit)
        def forward(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.arange(length * 1.0).sin(), torch.ones(length)

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ruler = Ruler()

        def forward(self, length: int) -> torch.Tensor:
            return self.ruler.forward(length)[0].unsqueeze(0)

    class Outside(nn.Module):
        def forward(self, length: int) -> torch.Tensor:
            return torch.from_numpy(np.ones(length))

    ruler, shown, outside = Ruler(), Shown(), Outside()
    for _ in range(2):
        assert counted(lambda: ruler(4)).uncounted == {}
        assert counted(lambda: shown(4)).uncounted == {}
        assert counted(lambda: outside(4)).uncounted == {"Outside": 1}
