"""Which module is charged: shared, recursive, parallel, hooked and nameless ones, forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import flopprof
from conservation import conserved, counted, own, where
from flopprof import FlopCounter
from modules import (
    MODELS,
    ROWS,
    WIDTH,
    Dataclasses,
    Holder,
    Keywords,
    L,
    Recursive,
    S,
    Tied,
    Twice,
    both,
    leaf,
    linear,
    train,
)


@pytest.mark.parametrize("name", MODELS)
def test_module(name: str) -> None:
    build, forward = MODELS[name]
    model = build()
    profile = counted(train(model), model=model)
    assert where(profile) == both(forward)


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_are_three_times_one(name: str) -> None:
    build, forward = MODELS[name]
    model = build()
    step = train(model)
    profile = counted(lambda: [step() for _ in range(3)], model=model)
    assert where(profile) == both({fqn: 3 * flops for fqn, flops in forward.items()})


def test_calls_of_every_module() -> None:
    model = nn.Sequential(Twice(), Recursive(), Tied())
    profile = counted(train(model), model=model)
    assert {row.fqn: row.calls for row in profile.modules} == {
        "": 1, "0": 1, "0.layer": 2, "1": 4, "1.layer": 3, "2": 1, "2.encode": 1, "2.decode": 1,
    }  # fmt: skip


def test_output_shapes_of_structured_outputs() -> None:
    model = nn.ModuleDict({"keyword": Keywords(), "data": Dataclasses()})
    profile = counted(lambda: (model["keyword"](leaf()), model["data"](leaf())), model=model)
    shapes = {row.fqn: row.output_shape for row in profile.modules}
    assert shapes["keyword.inner"] == shapes["data.inner"] == (ROWS, WIDTH)


def test_tied_weights_are_one_parameter() -> None:
    model = Tied()
    profile = counted(train(model), model=model)
    assert profile.n_params == WIDTH * WIDTH
    assert profile.by_parameter() == {"encode.weight": 6 * L}


# --- without a model, and other roots -------------------------------------------------------------------------------


def test_roots_are_named_after_their_class() -> None:
    first, second = Twice(), Twice()
    profile = counted(lambda: (train(first)(), train(second)(), train(first)()))
    assert where(profile) == both({"Twice.layer": 4 * L, "Twice#2.layer": 2 * L})


def test_a_module_outside_the_model_is_named_after_its_class() -> None:
    model, other = Twice(), Recursive()
    profile = counted(lambda: (train(model)(), train(other)()), model=model)
    assert where(profile) == both({"layer": 2 * L, "Recursive.layer": 3 * L})


def test_a_part_of_the_model_called_alone_keeps_its_name() -> None:
    model = nn.Sequential(Twice(), Recursive())
    profile = counted(train(model[1]), model=model)
    assert where(profile) == both({"1.layer": 3 * L})


def test_a_module_added_while_the_counter_is_open() -> None:
    model = nn.Sequential(linear())
    with FlopCounter(model) as counter:
        train(model)()
        model.append(linear())
        train(model)()
    assert where(conserved(counter.profile)) == both({"0": 2 * L, "1": L})


def test_a_module_replaced_while_the_counter_is_open() -> None:
    model = Holder(linear())
    with FlopCounter(model) as counter:
        train(model)()
        model.layer = linear()
        train(model)()
    assert where(conserved(counter.profile)) == both({"layer": 2 * L})


def test_modules_made_and_dropped_in_a_loop() -> None:
    """An address that a dead module leaves to a new one does not pass on its name."""
    with FlopCounter() as counter:
        for _ in range(20):
            train(Twice())()
            train(Recursive())()
    assert sum(own(conserved(counter.profile), "forward").values()) == 20 * 5 * L
    by_class = [fqn for fqn in own(counter.profile, "forward") if fqn.startswith("Twice")]
    assert sum(own(counter.profile, "forward")[fqn] for fqn in by_class) == 20 * 2 * L


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(WIDTH, bias=False), nn.Tanh(), nn.LazyLinear(WIDTH, bias=False))
    with FlopCounter(model) as counter:
        train(model)()
        train(model)()
    assert where(conserved(counter.profile)) == both({"0": 2 * L, "2": 2 * L})
    assert counter.profile.n_params == 2 * WIDTH * WIDTH
    other = nn.Sequential(nn.LazyLinear(WIDTH, bias=False), nn.LazyBatchNorm1d())
    assert flopprof.count(other, leaf(), backward=True).by_phase()["backward"] == 2 * L
    assert flopprof.count(other, leaf(), backward=True).by_parameter() == {"0.weight": 3 * L}
    assert other(leaf()).shape == (ROWS, WIDTH)


def test_parameters_of_modules_that_are_gone() -> None:
    counter = FlopCounter()

    def run() -> weakref.ref[nn.Module]:
        model = Tied()
        with counter:
            train(model)()
        return weakref.ref(model)

    assert run()() is None, "a counter keeps no module alive that it was not given"
    assert counter.profile.n_params == WIDTH * WIDTH
    assert {row.fqn: row.parameters for row in counter.profile.modules}["Tied"] == WIDTH * WIDTH


# --- parametrisations and hooks: what they multiply belongs to the module -------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["old", "new"])
def test_weight_norm(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(linear()), nn.Tanh(), linear())
    profile = counted(train(model), model=model)
    assert where(profile) == both({"0": L, "2": L})


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated:FutureWarning")
def test_spectral_norm() -> None:
    """One power iteration in training, W^T u and W v, and sigma = u . W v: products with W, and one dot."""
    product = 2 * WIDTH * WIDTH
    dot = 2 * WIDTH
    # sigma's backward: of the dot (u and v are constants) to W v: one; of W v to W, the outer product: one.
    forward, backward = 3 * product + dot, dot + product
    old = nn.Sequential(nn.utils.spectral_norm(linear()), nn.Tanh(), linear())
    assert where(counted(train(old), model=old)) == {
        "forward": {"0": L + forward, "2": L},
        "backward": {"0": 2 * L + backward, "2": 2 * L},
    }
    new = nn.Sequential(parametrizations.spectral_norm(linear()), nn.Tanh(), linear())
    profile = counted(train(new), model=new)
    assert profile.by_module("forward")["0"] == L + forward
    assert profile.by_module("backward")["0"] == 2 * L + backward
    assert own(profile, "forward")["0.parametrizations.weight.0"] == forward
    assert own(profile, "backward")["0.parametrizations.weight.0"] == backward


def test_a_parametrisation_is_a_module_below() -> None:
    class Symmetric(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w @ w.mT

    model = nn.Sequential(linear(), linear())
    parametrize.register_parametrization(model[1], "weight", Symmetric())
    profile = counted(train(model), model=model)
    product = 2 * WIDTH**3
    assert where(profile) == both({"0": L, "1": L, "1.parametrizations.weight.0": product})


def square(tensor: torch.Tensor) -> torch.Tensor:
    """Two rows times their transpose, a product that no gradient passes."""
    return tensor.detach() @ tensor.detach().mT


def test_hooks_that_multiply_belong_to_their_module() -> None:
    model = nn.Sequential(linear(), nn.Sequential(linear()))
    model[0].register_forward_pre_hook(lambda _m, args: (square(args[0]), None)[1])
    model[0].register_forward_hook(lambda _m, _args, output: (square(output), None)[1])
    model[1].register_forward_hook(lambda _m, _args, output: output @ torch.eye(WIDTH))
    profile = counted(train(model), model=model)
    assert own(profile, "forward") == {"0": L + 2 * S, "1": L, "1.0": L}
    assert own(profile, "backward") == {"0": 2 * L, "1": L, "1.0": 2 * L}


def test_backward_hooks_that_multiply_belong_to_their_module() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    model[1].register_full_backward_hook(lambda _m, _inputs, outputs: (square(outputs[0]), None)[1])
    model[1].register_full_backward_pre_hook(lambda _m, outputs: (square(outputs[0]), None)[1])
    profile = counted(train(model), model=model)
    assert own(profile, "forward") == {"0": L, "1": L, "2": L}
    assert own(profile, "backward") == {"0": 2 * L, "1": 2 * L + 2 * S, "2": 2 * L}


def test_a_model_that_is_gone_before_its_counter_closes_keeps_its_parameters() -> None:
    def train() -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 4, bias=False)))
        model[0].bias.requires_grad_(False)
        model(torch.randn(2, 8)).sum().backward()

    with FlopCounter() as counter:
        train()
    profile = counter.profile
    assert {row.name: row.shape for row in profile.parameters} == {
        "Sequential.0.weight": (16, 8), "Sequential.0.bias": (16,), "Sequential.1.1.weight": (4, 16),
    }  # fmt: skip
    assert (profile.n_params, profile.n_params_trainable) == (8 * 16 + 16 + 16 * 4, 8 * 16 + 16 * 4)
    assert {row.fqn: (row.parameters, row.own_parameters) for row in profile.modules} == {
        "": (0, 0), "Sequential": (208, 0), "Sequential.0": (144, 144), "Sequential.1": (64, 0),
        "Sequential.1.0": (0, 0), "Sequential.1.1": (64, 64),
    }  # fmt: skip
    ledger = profile.reconcile(tokens=2)
    assert (ledger.measured_flops, ledger.term_flops()["never_multiplied"], ledger.residual) == (768, -64, 0)
