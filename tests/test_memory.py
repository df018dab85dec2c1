"""A counter leaves nothing behind, and does not grow with the steps it counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conservation import conserved, counted, where
from flopprof import FlopCounter
from flopprof.counting import attribution
from modules import (
    ROWS,
    WIDTH,
    L,
    OwnProducts,
    Recursive,
    S,
    Tied,
    Twice,
    both,
    leaf,
    linear,
    train,
)

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
    where, tally, sources = counter.where, counter.tally, counter._sources
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
