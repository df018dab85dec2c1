"""Activation checkpointing: what backward runs again is `recompute`, of the module that is replayed.

The network is three bias-free linear layers on 2 rows, 3 -> 5 -> 7 -> 4, with tanh between. One product of each,
forward or for one gradient, is A = 2*2*3*5, B = 2*2*5*7, C = 2*2*7*4. Checkpointing without reentrance stops early:
once the last tensor that backward needs is saved again, which is before the last product runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from conservation import conserved, counted, own, where
from flopprof import FlopCounter

A, B, C = 60, 140, 112
FORWARD = {"a": A, "b": B, "c": C}

KINDS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "early stop": partial(checkpoint, use_reentrant=False),
    "whole": partial(checkpoint, use_reentrant=False),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def early_stop(kind: str) -> Iterator[None]:
    with set_checkpoint_early_stop(kind == "early stop"):
        yield


class Net(nn.Module):
    """`save` is how the function given to it is called: plainly, or through a checkpoint."""

    def __init__(self, save: Callable[..., Any] = lambda function, *args: function(*args)) -> None:
        super().__init__()
        self.a = nn.Linear(3, 5, bias=False)
        self.b = nn.Linear(5, 7, bias=False)
        self.c = nn.Linear(7, 4, bias=False)
        self.save = save

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.save(self.first, x)))


class Nested(Net):
    def whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.save(self.first, x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.save(self.whole, x)


def leaf() -> torch.Tensor:
    return torch.randn(2, 3, requires_grad=True)


@kinds
def test_a_checkpointed_part_of_a_model(kind: str) -> None:
    net = Net(KINDS[kind])
    with early_stop(kind):
        profile = counted(lambda: net(leaf()).sum().backward(), model=net)
    assert where(profile) == {
        "forward": FORWARD,
        "backward": {"a": 2 * A, "b": 2 * B, "c": 2 * C},
        "recompute": {"a": A} if kind == "early stop" else {"a": A, "b": B},
    }
    assert profile.model_flops == 3 * (A + B + C)
    assert {row.fqn: row.calls for row in profile.modules} == {"": 1, "a": 1, "b": 1, "c": 1}


@kinds
def test_a_checkpointed_model_outside_modules(kind: str) -> None:
    net = Net()
    with early_stop(kind):
        profile = counted(lambda: KINDS[kind](net, leaf()).sum().backward(), model=net)
    assert where(profile) == {
        "forward": FORWARD,
        "backward": {"a": 2 * A, "b": 2 * B, "c": 2 * C},
        "recompute": {"a": A, "b": B} if kind == "early stop" else FORWARD,
    }


@kinds
def test_nested_checkpoints_replay_the_inner_part_twice(kind: str) -> None:
    net = Nested(KINDS[kind])
    with early_stop(kind):
        profile = counted(lambda: net(leaf()).sum().backward(), model=net)
    # The outer replay runs a and b (and c, unless it stops before); the inner one a again (and b likewise).
    assert own(profile, "recompute") == (
        {"a": 2 * A, "b": B} if kind == "early stop" else {"a": 2 * A, "b": 2 * B, "c": C}
    )
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == {"a": 2 * A, "b": 2 * B, "c": 2 * C}


@kinds
def test_a_plain_function_belongs_to_the_module_that_called_checkpoint(kind: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5))
            self.v = nn.Parameter(torch.randn(5, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return KINDS[kind](lambda x: torch.tanh(x @ self.w) @ self.v, x)

    model = nn.Sequential(nn.Linear(3, 3, bias=False), Inner(), nn.Linear(7, 4, bias=False))
    with early_stop(kind):
        profile = counted(lambda: model(leaf()).sum().backward(), model=model)
    assert where(profile) == {
        "forward": {"0": 36, "1": A + B, "2": C},
        "backward": {"0": 72, "1": 2 * A + 2 * B, "2": 2 * C},
        "recompute": {"1": A if kind == "early stop" else A + B},
    }


@kinds
def test_a_shared_module_is_replayed_under_the_name_it_ran_under(kind: str) -> None:
    shared = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return KINDS[kind](self.block, x)

    model = nn.ModuleDict({"left": Branch(), "right": Branch()})
    with early_stop(kind):
        profile = counted(lambda: model["right"](model["left"](leaf())).sum().backward(), model=model)
    once = {f"{side}.block.{layer}": A for side in ("left", "right") for layer in (0, 2)}
    assert own(profile, "forward") == once
    assert own(profile, "backward") == dict.fromkeys(once, 2 * A)
    assert own(profile, "recompute") == (
        {name: A for name in once if name.endswith("0")} if kind == "early stop" else once
    )


def test_selective_checkpointing_replays_only_what_was_not_saved() -> None:
    def save_wide(_context: Any, operator: Any, *args: Any, **_: Any) -> CheckpointPolicy:
        wide = operator is torch.ops.aten.mm.default and args[1].shape == (5, 7)
        return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE

    policies = {
        "every mm": ([torch.ops.aten.mm.default], {}),
        "the mm of b": (save_wide, {"a": A}),
    }
    for policy, recomputed in policies.values():
        context = partial(create_selective_checkpoint_contexts, policy)
        with set_checkpoint_early_stop(False):
            net = Net(partial(checkpoint, use_reentrant=False, context_fn=context))
            profile = counted(lambda: net(leaf()).sum().backward(), model=net)
        assert own(profile, "recompute") == recomputed
        assert own(profile, "forward") == FORWARD
        assert own(profile, "backward") == {"a": 2 * A, "b": 2 * B, "c": 2 * C}


class Shifted(torch.autograd.Function):
    """Multiplies, in a function of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


def test_what_a_policy_saved_is_no_work_outside_the_dispatcher() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)
            self.weight = nn.Parameter(torch.randn(3, 3))

        def inside(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(Shifted.apply(x, self.weight))))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
            context = partial(create_selective_checkpoint_contexts, saved)
            return checkpoint(self.inside, x, use_reentrant=False, context_fn=context)

    block, flops = Block(), 2 * 2 * (3 * 5 + 5 * 3 + 3 * 3)
    profile = counted(lambda: block(leaf()).sum().backward(), model=block)
    assert profile.exact
    assert profile.by_phase() == {"forward": flops, "backward": 2 * flops, "recompute": 0, "optimizer": 0}


def test_checkpoint_sequential_leaves_its_last_segment_alone() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    layer = 2 * 2 * 3 * 3
    with set_checkpoint_early_stop(False):
        profile = counted(
            lambda: checkpoint_sequential(model, 2, leaf(), use_reentrant=False).sum().backward(), model=model
        )
    assert own(profile, "forward") == dict.fromkeys("0123", layer)
    assert own(profile, "backward") == dict.fromkeys("0123", 2 * layer)
    assert own(profile, "recompute") == dict.fromkeys("01", layer)


@pytest.mark.parametrize("kind", ["early stop", "whole"])
def test_gradient_penalty_through_a_checkpoint(kind: str) -> None:
    net, plain = Net(KINDS[kind]), Net()

    def penalty(model: nn.Module) -> None:
        x = leaf()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (gradient**2).sum().backward()

    without = counted(penalty, plain, model=plain)
    with early_stop(kind):
        profile = counted(penalty, net, model=net)
    # Both backwards replay; what they differentiate is what they differentiate without a checkpoint.
    assert own(profile, "recompute") == ({"a": 2 * A} if kind == "early stop" else {"a": 2 * A, "b": 2 * B})
    assert own(profile, "forward") == FORWARD
    assert own(profile, "backward") == own(without, "backward")
    # First: A + B + C. Of 1 @ Wc only Wc (C), of the other two both factors (2A + 2B); c's forward is in no
    # gradient's way, those of a and b are: 2A + 2B.
    assert own(without, "backward") == {"a": 5 * A, "b": 5 * B, "c": 2 * C}


@pytest.mark.parametrize("kind", ["early stop", "whole"])
def test_several_backwards_replay_each_time(kind: str) -> None:
    net = Net(KINDS[kind])

    def run() -> None:
        loss = net(leaf()).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    with early_stop(kind):
        profile = counted(run, model=net)
    assert own(profile, "backward") == {"a": 4 * A, "b": 4 * B, "c": 4 * C}
    assert own(profile, "recompute") == ({"a": 2 * A} if kind == "early stop" else {"a": 2 * A, "b": 2 * B})


@kinds
def test_a_forward_without_gradients_replays_nothing(kind: str) -> None:
    net = Net(KINDS[kind])
    with torch.no_grad():
        profile = counted(lambda: net(leaf()), model=net)
    assert where(profile) == {"forward": FORWARD}


@pytest.mark.parametrize("kind", ["early stop", "whole"])
def test_gradient_taken_inside_a_checkpoint(kind: str) -> None:
    """An energy model: the force is a gradient, computed inside the checkpointed function."""
    net = Net()

    def force(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]

    with early_stop(kind):
        profile = counted(lambda: (KINDS[kind](force, leaf()) ** 2).sum().backward(), model=net)
    # The gradient inside asks for saved tensors, so it replays at once: whole, with the gradient inside, or as far as
    # the forward had saved: a and b. The last backward replays again, whole or up to before the product with Wa.
    assert own(profile, "forward") == FORWARD
    early = {"a": A + A, "b": B + 2 * B, "c": 2 * C}
    assert own(profile, "recompute") == (early if kind == "early stop" else {"a": 4 * A, "b": 4 * B, "c": 4 * C})
    assert own(profile, "backward") == {"a": 5 * A, "b": 5 * B, "c": 2 * C}


def test_a_checkpoint_run_before_the_counter_replays_its_modules() -> None:
    net = Net(KINDS["whole"])
    with set_checkpoint_early_stop(False):
        loss = net(leaf()).sum()
    profile = counted(loss.backward, model=net)
    assert where(profile) == {"backward": {"": 2 * (A + B + C)}, "recompute": {"a": A, "b": B}}


@kinds
def test_a_replay_that_raises_leaves_the_counter_usable(kind: str) -> None:
    net = Net(KINDS[kind])
    failing = [False]

    def fail(*_: Any) -> None:
        if failing[0]:
            raise ValueError("replay failed")

    net.a.register_forward_hook(fail)
    with early_stop(kind), FlopCounter(net) as counter:
        loss = net(leaf()).sum()
        failing[0] = True
        with pytest.raises(ValueError, match="replay failed"):
            loss.backward()
        failing[0] = False
        net(leaf()).sum().backward()
    profile = conserved(counter.profile)
    assert own(profile, "forward") == {name: 2 * flops for name, flops in FORWARD.items()}
    # The failed backward had c behind it, and the product of a replayed.
    assert own(profile, "backward") == {"a": 2 * A, "b": 2 * B, "c": 4 * C}
    assert own(profile, "recompute") == {"a": 2 * A} | ({} if kind == "early stop" else {"b": B})


@kinds
def test_what_a_replay_runs_without_gradients_is_recompute_too(kind: str) -> None:
    """A frozen teacher, or a codebook look-up: under no_grad inside the checkpointed part."""

    class Teacher(Net):
        def first(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                target = x @ torch.ones(3, 5)
            return self.b(torch.tanh(self.a(x) - target))

    net = Teacher(KINDS[kind])
    with early_stop(kind):
        profile = counted(lambda: net(leaf()).sum().backward(), model=net)
    assert where(profile) == {
        "forward": {"": A, **FORWARD},
        "backward": {"a": 2 * A, "b": 2 * B, "c": 2 * C},
        "recompute": {"": A, "a": A} | ({} if kind == "early stop" else {"b": B}),
    }


def test_a_checkpoint_of_ones_own_is_recompute() -> None:
    """As Megatron and DeepSpeed write it: modules called under enable_grad in a function's backward."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            ctx.module = module
            ctx.save_for_backward(x)
            return module(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.module(x)
            torch.autograd.backward(output, gradient)
            return None, x.grad

    net = Net()
    block = nn.Sequential(net.a, nn.Tanh(), net.b)
    profile = counted(lambda: Again.apply(block, leaf()).sum().backward(), model=block)
    assert where(profile) == {
        "forward": {"0": A, "2": B},
        "backward": {"0": 2 * A, "2": 2 * B},
        "recompute": {"0": A, "2": B},
    }


@kinds
def test_results_of_checkpointed_training_are_bitwise_the_same(kind: str) -> None:
    class Dropping(Net):
        def first(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().first(x), 0.5)

    net, x = Dropping(KINDS[kind]), leaf()

    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        net.zero_grad()
        with early_stop(kind):
            output = net(x)
            output.sum().backward()
        return [output, *(parameter.grad for parameter in net.parameters())]

    bare = train()
    with FlopCounter(net):
        under = train()
    assert all(torch.equal(left, right) for left, right in zip(bare, under, strict=True))
