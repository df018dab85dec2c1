"""Optimizers that multiply matrices: phase `optimizer`, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction, signature
from typing import Any

import pytest
import torch
from torch import nn

import flopprof
from conservation import conserved, counted, own, where
from flopprof import FlopCounter

ROWS, N = 2, 4
# One linear layer N -> N on two rows: forward, and backward for its weight.
L = 2 * ROWS * N * N
SQUARE = 2 * N**3
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum by Newton-Schulz: x x^T, its square, and the product with x in each iteration."""

    def __init__(self, params: Any, *, fails: bool = False) -> None:
        super().__init__(params, {"lr": 0.1})
        self.fails = fails

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                x = parameter.grad / (parameter.grad.norm() + 1e-7)
                for _ in range(ITERATIONS):
                    gram = x @ x.mT
                    if self.fails:
                        raise ValueError("no luck")
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                parameter.sub_(x, alpha=group["lr"])
        return loss


class Shampoo(torch.optim.Optimizer):
    """Preconditioners G G^T and G^T G, their inverse roots by eigenvectors, and the product with both."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                left = torch.linalg.cholesky(gradient @ gradient.mT + torch.eye(N))
                right = torch.linalg.cholesky(gradient.mT @ gradient + torch.eye(N))
                parameter.sub_(left @ gradient @ right, alpha=group["lr"])


def model() -> nn.Linear:
    return nn.Linear(N, N, bias=False)


def data() -> torch.Tensor:
    return torch.randn(ROWS, N)


def phases(forward: int, backward: int, optimizer: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "recompute": 0, "optimizer": optimizer}


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(data()).square().sum().backward()
    optimizer.step()


def test_newton_schulz() -> None:
    net = model()
    profile = counted(step, net, Muon(net.parameters()), model=net)
    assert profile.by_phase() == phases(L, L, ITERATIONS * 3 * SQUARE)
    assert profile.model_flops == 2 * L
    assert profile.hardware_flops == 2 * L + ITERATIONS * 3 * SQUARE


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_torch_muon() -> None:
    net = model()
    optimizer = torch.optim.Muon(net.parameters(), ns_steps=ITERATIONS)
    profile = counted(step, net, optimizer, model=net)
    assert profile.by_phase() == phases(L, L, ITERATIONS * 3 * SQUARE)
    assert profile.by_dtype("optimizer") == {"bfloat16": ITERATIONS * 3 * SQUARE}


def test_shampoo() -> None:
    net = model()
    profile = counted(step, net, Shampoo(net.parameters()), model=net)
    assert profile.by_phase() == phases(L, L, 4 * SQUARE)
    assert set(profile.uncounted) == {"aten::linalg_cholesky_ex"}


ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam")


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("foreach", [False, True])
def test_elementwise_optimizers_multiply_nothing(kind: str, foreach: bool) -> None:
    net = model()
    profile = counted(step, net, getattr(torch.optim, kind)(net.parameters(), lr=0.1, foreach=foreach), model=net)
    assert profile.by_phase() == phases(L, L, 0)
    assert {row.phase for row in profile.elementwise if row.op.startswith(("aten::_foreach", "aten::addcdiv"))} <= {
        "optimizer"
    }
    assert profile.exact


def test_sgd_is_two_operations_an_element() -> None:
    net = model()
    profile = counted(step, net, torch.optim.SGD(net.parameters(), lr=0.1, foreach=False), model=net)
    assert profile.elementwise_by_module("optimizer")[""] == 2 * N * N


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_a_closure_is_forward_and_backward(line_search: str | None) -> None:
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4, line_search_fn=line_search)
    inputs, closures = data(), []

    def closure() -> torch.Tensor:
        closures.append(1)
        optimizer.zero_grad()
        loss = net(inputs).square().sum()
        loss.backward()
        return loss

    profile = counted(lambda: optimizer.step(closure), model=net)
    assert len(closures) > 1
    assert own(profile, "forward") == {"": len(closures) * L}
    assert own(profile, "backward") == {"": len(closures) * L}
    # Its own work: dot products over all elements.
    assert set(profile.by_operator("optimizer")) == {"aten::dot"}
    assert profile.optimizer_flops % (2 * N * N) == 0


def test_a_closure_by_keyword_and_its_own_work_after_it() -> None:
    net = model()
    optimizer = Muon(net.parameters())

    def closure() -> torch.Tensor:
        loss = net(data()).sum()
        loss.backward()
        return loss

    for run in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        optimizer.zero_grad()
        profile = counted(run, model=net)
        assert profile.by_phase() == phases(L, L, ITERATIONS * 3 * SQUARE)


class Searching(torch.optim.Optimizer):
    """Calls its closure with arguments, and reads and writes what the closure holds."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        assert isfunction(closure)
        assert list(signature(closure).parameters) == ["backward"]
        with torch.enable_grad():
            loss = closure(backward=True)
        closure.calls += 1
        torch.eye(N) @ torch.eye(N)
        closure(False)
        return loss


class OnModel(torch.optim.Optimizer):
    """Runs the model that its step is given, and no closure."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, net: Any, inputs: Any) -> Any:  # type: ignore[override]
        assert isinstance(net, nn.Module)
        return net(inputs).sum()


def test_a_closure_takes_arguments_and_holds_attributes() -> None:
    net = model()

    def closure(backward: bool = True) -> torch.Tensor:
        loss = net(data()).sum()
        if backward:
            loss.backward()
        return loss

    closure.calls = 0  # type: ignore[attr-defined]
    profile = counted(lambda: Searching(net.parameters()).step(closure), model=net)
    assert closure.calls == 1  # type: ignore[attr-defined]
    assert profile.by_phase() == phases(2 * L, L, SQUARE)


def test_a_module_that_a_step_is_given_is_no_closure() -> None:
    net = model()
    profile = counted(lambda: OnModel(net.parameters()).step(net, data()), model=net)
    assert profile.by_phase() == phases(0, 0, L)


def test_a_function_that_comes_first_is_the_closure_whatever_its_name() -> None:
    net = model()

    class Named(torch.optim.Optimizer):
        def step(self, evaluate: Any, scale: Any) -> Any:  # type: ignore[override]
            return scale(evaluate())

    def evaluate() -> torch.Tensor:
        return net(data()).sum()

    def scale(loss: torch.Tensor) -> torch.Tensor:
        torch.eye(N) @ torch.eye(N)
        return loss

    profile = counted(lambda: Named(net.parameters(), {}).step(evaluate, scale), model=net)
    assert profile.by_phase() == phases(L, 0, SQUARE)


def test_the_closure_is_the_parameter_of_that_name() -> None:
    net = model()

    class Second(torch.optim.Optimizer):
        def step(self, scale: Any, closure: Any = None) -> Any:  # type: ignore[override]
            return scale(closure())

    def scale(loss: torch.Tensor) -> torch.Tensor:
        torch.eye(N) @ torch.eye(N)
        return loss

    def closure() -> torch.Tensor:
        return net(data()).sum()

    optimizer = Second(net.parameters(), {})
    for run in (lambda: optimizer.step(scale, closure), lambda: optimizer.step(scale, closure=closure)):
        assert counted(run, model=net).by_phase() == phases(L, 0, SQUARE)


def test_a_step_that_raises_does_not_stick() -> None:
    net = model()
    optimizer = Muon(net.parameters(), fails=True)
    with FlopCounter(net) as counter:
        with pytest.raises(ValueError, match="no luck"):
            step(net, optimizer)
        net(data())
        data() @ torch.eye(N)
    assert conserved(counter.profile).by_phase() == phases(3 * L, L, SQUARE)


def test_a_step_that_raises_is_over_for_what_is_no_module() -> None:
    net = model()
    optimizer = Muon(net.parameters(), fails=True)
    with FlopCounter(net) as counter:
        with pytest.raises(ValueError, match="no luck"):
            step(net, optimizer)
        weight = torch.eye(N, requires_grad=True)
        (data() @ weight).sum().backward()
    assert conserved(counter.profile).by_phase() == phases(2 * L, 2 * L, SQUARE)


def test_a_step_that_raises_then_another_optimizer() -> None:
    net = model()
    failing, working = Muon(net.parameters(), fails=True), Muon(net.parameters())
    with FlopCounter(net) as counter:
        with pytest.raises(ValueError, match="no luck"):
            step(net, failing)
        step(net, working)
        net(data())
    assert conserved(counter.profile).by_phase() == phases(3 * L, 2 * L, SQUARE + ITERATIONS * 3 * SQUARE)


def test_a_closure_that_raises() -> None:
    net = model()
    optimizer = Muon(net.parameters())

    def closure() -> None:
        net(data())
        raise ValueError("no luck")

    with FlopCounter(net) as counter:
        with pytest.raises(ValueError, match="no luck"):
            optimizer.step(closure)
        net(data())
    assert where(conserved(counter.profile)) == {"forward": {"": 2 * L}}


def test_a_step_inside_backward() -> None:
    """The optimizer fused into backward, by hooks that run as soon as a gradient is there."""
    net = nn.Sequential(model(), model())
    for layer in net:
        optimizer = Muon(layer.parameters())
        layer.weight.register_post_accumulate_grad_hook(lambda _p, optimizer=optimizer: optimizer.step())
    profile = counted(lambda: net(data()).sum().backward(), model=net)
    assert own(profile, "forward") == {"0": L, "1": L}
    assert own(profile, "backward") == {"0": L, "1": 2 * L}
    assert profile.optimizer_flops == 2 * ITERATIONS * 3 * SQUARE


def test_a_wrapped_optimizer_is_one_step() -> None:
    """An optimizer whose step calls another's: both are optimizer, and what follows is not."""

    class Outer(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups[0]["params"], {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:
            self.inner.step()
            with torch.no_grad():
                _ = torch.eye(N) @ torch.eye(N)

    net = model()
    with FlopCounter(net) as counter:
        step(net, Outer(Muon(net.parameters())))
        net(data())
    assert conserved(counter.profile).by_phase() == phases(2 * L, L, ITERATIONS * 3 * SQUARE + SQUARE)


def test_a_counter_around_one_step_only() -> None:
    net = model()
    optimizer = Muon(net.parameters())
    net(data()).sum().backward()
    assert counted(optimizer.step).by_phase() == phases(0, 0, ITERATIONS * 3 * SQUARE)


def test_optimizer_steps_without_a_counter_are_untouched() -> None:
    net = model()
    optimizer = Muon(net.parameters())
    with FlopCounter(net):
        step(net, optimizer)
    step(net, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_count_with_an_optimizer() -> None:
    net, optimizer = model(), None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = net.weight.detach().clone()
    profile = conserved(flopprof.count(net, data(), optimizer=optimizer))
    assert profile.by_phase() == phases(L, L, 0)
    muon = conserved(flopprof.count(net, data(), optimizer=Muon(net.parameters())))
    assert muon.optimizer_flops == ITERATIONS * 3 * SQUARE
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None
    assert not optimizer.state
