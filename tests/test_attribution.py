"""Which module is charged: shared, recursive, parallel, hooked and nameless ones, forward and backward.

A linear layer n -> n on r rows without bias is one product, 2 r n n; its backward as many again for its weight, and for
its input where that wants a gradient.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import flopprof
from conservation import conserved, counted, own, where
from flopprof import FlopCounter
from flopprof.counting import attribution

ROWS, WIDTH = 2, 3
L = 2 * ROWS * WIDTH * WIDTH


def linear(n: int = WIDTH, m: int | None = None) -> nn.Linear:
    return nn.Linear(n, m or n, bias=False)


def leaf() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def train(model: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    return lambda: model(leaf()).sum().backward()


def both(forward: dict[str, int]) -> dict[str, dict[str, int]]:
    """Forward as given, and twice that in backward: both operands of every product want a gradient."""
    return {"forward": forward, "backward": {fqn: 2 * flops for fqn, flops in forward.items()}}


# --- models: (model, own forward FLOPs by module); backward is twice that ------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
        return x if depth == 0 else self(torch.tanh(self.layer(x)), depth - 1)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = linear(), linear(), linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.left(x), self.right(x)
        return self.join(torch.tanh(right) + torch.tanh(left))


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = linear(), linear()

    def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
        return {"scores": [self.query(left) + self.key(right)], "note": "kept"}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = KeywordOnly()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(left=x, right=x)["scores"][0]


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float = 2.0


class Dataclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Structured()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(Batch(x)).x


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, batch: Batch) -> Batch:
        return Batch(self.layer(batch.x) * batch.scale)


class OwnProducts(nn.Module):
    """Products in the module's own forward, between and after those of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.w)
        x = torch.tanh(self.layer(x))
        return x @ self.w


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = linear(), linear()
        self.decode.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class Lists(nn.Module):
    """Modules that no container registers: named after their class, below the module that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [linear(), linear()]
        self.out = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


def two_parents() -> nn.Module:
    layer = linear()
    return nn.Sequential(Holder(layer), Holder(layer))


def called_by_another() -> nn.Module:
    """A layer that one module registers and another, which does not hold it, calls."""

    class Borrower(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.borrowed = [layer]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.borrowed[0](x)

    owner = Holder(linear())
    return nn.Sequential(owner, Borrower(owner.layer))


def deep() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Sequential(linear()), nn.Tanh()), linear())


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "called twice": (Twice, {"layer": 2 * L}),
    "two names of one parent": (TwoNames, {"first": 2 * L}),
    "shared under two parents": (two_parents, {"0.layer": L, "1.layer": L}),
    "called by a module that does not hold it": (called_by_another, {"0.layer": 2 * L}),
    "recursive": (Recursive, {"layer": 3 * L}),
    "parallel branches": (Branches, {"left": L, "right": L, "join": L}),
    "keyword-only": (Keywords, {"inner.query": L, "inner.key": L}),
    "dataclasses": (Dataclasses, {"inner.layer": L}),
    "own products around a child's": (OwnProducts, {"": 2 * L, "layer": L}),
    "tied weights": (Tied, {"encode": L, "decode": L}),
    "modules in a list": (Lists, {"Linear": L, "Linear#2": L, "out": L}),
    "deep": (deep, {"0.0.0": L, "1": L}),
}


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


S = 2 * ROWS * ROWS * WIDTH


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


# --- nothing is left behind, and nothing grows ----------------------------------------------------------------------


def test_no_attribute_is_left_on_modules_or_tensors() -> None:
    model, x = nn.Sequential(Twice(), Tied()), leaf()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    counted(lambda: model(x).sum().backward(), model=model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    for module in model.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert not getattr(module, hooks)
    for tensor in (x, *model.parameters()):
        assert not tensor._backward_hooks
        assert set(vars(tensor)) == set()


def internal_size(counter: FlopCounter) -> dict[str, int]:
    """Entries in every table that a counter keeps."""
    where, tally, sources = counter.where, counter._tally, counter._sources
    return {
        "timelines": sum(len(timeline) for timeline in where._timelines.values()),
        "counted": len(tally.counted),
        "elementwise": len(tally.elementwise),
        "sources": len(sources.known),
        "frames": len(counter._names.frames),
        "passes": len(where._passes),
    }


def evaluate(model: nn.Module) -> None:
    model(leaf())


def evaluate_and_train(model: nn.Module) -> None:
    model(leaf())
    train(model)()


def reversed_order(model: nn.Module) -> None:
    losses = [model(leaf()).sum() for _ in range(3)]
    for loss in reversed(losses):
        loss.backward()


def penalised(model: nn.Module) -> None:
    x = leaf()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (gradient**2).sum().backward()


def retained(model: nn.Module) -> None:
    loss = model(leaf()).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)


def failing(model: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        model(torch.ones(ROWS, WIDTH + 1))


# What no backward frees is dropped by age: at most this many notes, here set low.
NOTES, SITES, TIDY = 512, 128, 64
STEPS = {
    "training": lambda model: train(model)(),
    "evaluation in between": evaluate_and_train,
    "forward only": evaluate,
    "backwards in reversed order": reversed_order,
    "double backward": penalised,
    "graphs retained": retained,
    "exceptions": failing,
}


@pytest.mark.parametrize("name", STEPS)
def test_memory_does_not_grow_with_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in (("_MOST_NOTES", NOTES), ("_MOST_SITES", SITES), ("_TIDY_AT", TIDY)):
        monkeypatch.setattr(attribution, constant, value)
    model = nn.Sequential(Twice(), OwnProducts(), Tied())
    sizes = []
    with FlopCounter(model) as counter:
        for _ in range(300):
            STEPS[name](model)
            sizes.append(internal_size(counter))
    # One pass has at most 64 notes; what is kept are the latest eight, and what doubling leaves.
    assert max(size.pop("timelines") for size in sizes) <= 2 * NOTES
    assert sizes[50] == sizes[-1]
    conserved(counter.profile)


@pytest.mark.parametrize("name", ["training", "double backward", "backwards in reversed order"])
def test_what_backward_freed_is_forgotten(name: str) -> None:
    model = nn.Sequential(Twice(), OwnProducts(), Tied())
    with FlopCounter(model) as counter:
        for _ in range(300):
            STEPS[name](model)
        assert internal_size(counter)["timelines"] <= 3 * attribution._TIDY_AT


def test_a_graph_may_wait_while_others_come_and_go() -> None:
    waiting, model = Recursive(), Twice()
    both_models = nn.ModuleDict({"waiting": waiting, "model": model})
    with FlopCounter(both_models) as counter:
        before = model(leaf())
        loss = waiting(leaf()).sum()
        (model(leaf()) + before).sum().backward()
        for _ in range(1000):
            train(model)()
        loss.backward()
    assert where(conserved(counter.profile)) == both({"waiting.layer": 3 * L, "model.layer": 2 * 1002 * L})
    assert counter.profile.by_parameter("backward")["waiting.layer.weight"] == 6 * L


def test_a_frozen_product_does_not_take_the_place_of_the_node_before() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = linear().requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x @ x.mT
            return scores.sum() + self.frozen(torch.ones(ROWS, WIDTH)).sum()

    model = Frozen()
    profile = counted(train(model), model=model)
    assert where(profile) == {"forward": {"": S, "frozen": L}, "backward": {"": 2 * S}}
    assert profile.by_parameter() == {"frozen.weight": L}
