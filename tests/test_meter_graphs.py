"""Work that depends on more than the latest call: graphs that live on, what runs between models, hidden sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from flopprof import Meter

ROWS = [10, 10, 10, 10, 3, 10, 10, 3, 10, 10]


def flops(meter: Meter) -> list[int | None]:
    meter.summary()
    return [record.model_flops for record in meter.records]


def metered(models: Iterable[nn.Module], step: Callable[[Any], object], sizes: Iterable[Any]) -> list[int | None]:
    with Meter(models) as meter:
        for size in sizes:
            with meter.step():
                step(size)
        return flops(meter)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


# --- graphs that live on ----------------------------------------------------------------------------------------------
def test_a_second_head_goes_down_to_the_encoder_of_the_first() -> None:
    encoder, first, second = linear(8, 16), linear(16, 3), linear(16, 5)

    def step(length: int) -> None:
        features = encoder(torch.randn(4, length, 8)).mean(1)
        first(features).sum().backward(retain_graph=True)
        second(features).sum().backward()

    # The encoder is differentiated twice, for its weight alone: its input wants no gradient.
    hand = [2 * 4 * (3 * n * 8 * 16 + 3 * 16 * (3 + 5)) for n in ROWS]
    assert metered([encoder, first, second], step, ROWS) == hand


def test_a_generator_lives_on_behind_the_backward_of_the_discriminator() -> None:
    generator, discriminator = linear(8, 16), linear(16, 1)

    def step(length: int) -> None:
        fake = generator(torch.randn(4, length, 8)).mean(1)
        (discriminator(torch.randn(4, 16)).sum() - discriminator(fake.detach()).sum()).backward()
        discriminator(fake).sum().backward()

    hand = [2 * 4 * (2 * n * 8 * 16 + (2 + 2 + 3) * 16) for n in ROWS]
    assert metered([generator, discriminator], step, ROWS) == hand


@pytest.mark.parametrize("frozen_first", [False, True])
def test_what_runs_between_a_model_and_a_frozen_one_depends_on_both(frozen_first: bool) -> None:
    """Late interaction: every token of a text with every patch of an image."""
    trained, frozen = linear(6, 8), linear(6, 8)

    def step(length: int) -> None:
        if frozen_first:
            with torch.no_grad():
                image = frozen(torch.randn(4, length, 6))
            text = trained(torch.randn(4, 5, 6))
        else:
            text = trained(torch.randn(4, length, 6))
            with torch.no_grad():
                image = frozen(torch.randn(4, 5, 6))
        torch.einsum("atd,bpd->abtp", text, image).sum().backward()

    hand = [2 * 4 * 6 * 8 * ((2 * 5 + n) if frozen_first else (2 * n + 5)) + 2 * (2 * 4 * 4 * n * 5 * 8) for n in ROWS]
    assert metered([trained, frozen], step, ROWS) == hand


def test_what_was_told_apart_is_told_apart_by_the_next_process() -> None:
    generator, discriminator = linear(8, 16), linear(16, 1)

    def step(meter: Meter, length: int) -> None:
        with meter.step():
            fake = generator(torch.randn(4, length, 8)).mean(1)
            discriminator(fake.detach()).sum().backward()
            discriminator(fake).sum().backward()

    hand = [2 * 4 * (2 * n * 8 * 16 + (2 + 3) * 16) for n in (10, 3)]
    with Meter(generator, discriminator) as meter:
        for length in ROWS:
            step(meter, length)
        state = meter.state_dict()
        assert meter.summary().notes[0].startswith("what a segment of the steps multiplies depends on what came before")
    with Meter(generator, discriminator) as meter:
        meter.load_state_dict(state)
        for length in (3, 10, 10, 3):
            step(meter, length)
        assert flops(meter)[-4:] == [hand[1], hand[0], hand[0], hand[1]]
        assert not any("counted" in record.left_out for record in meter.records[-4:])


# --- what a backward pass goes down to --------------------------------------------------------------------------------
def test_a_backward_pass_is_told_by_what_it_goes_down_to() -> None:
    """Block coordinate descent: one block's weight in each step, or a tensor's gradient."""
    first, second = linear(4, 8), linear(8, 8)
    model = nn.Sequential(first, second)

    def step(block: nn.Linear | None) -> None:
        x = torch.randn(2, 4, requires_grad=True)
        model(x).sum().backward(inputs=[x if block is None else block.weight])

    forward, once = 2 * 2 * (4 * 8 + 8 * 8), 2 * 2 * 8 * 8
    hand = {second: forward + once, first: forward + once + 2 * 2 * 4 * 8, None: forward + once + 2 * 2 * 4 * 8}
    blocks = [second, first, None] * 4
    assert metered([model], step, blocks) == [hand[block] for block in blocks]


# --- parameters of the caller's ---------------------------------------------------------------------------------------
def test_gradients_of_its_own_parameters_though_it_is_called_with_others() -> None:
    first, second = linear(4, 8), linear(8, 2)
    model = nn.Sequential(first, second)

    def step(block: nn.Linear) -> None:
        noisy = {name: parameter + 1 for name, parameter in model.named_parameters()}
        loss = torch.func.functional_call(model, noisy, (torch.randn(3, 4),)).sum()
        torch.autograd.grad(loss, [block.weight])

    forward, once = 2 * 3 * (4 * 8 + 8 * 2), 2 * 3 * 8 * 2
    hand = {second: forward + once, first: forward + once + 2 * 3 * 4 * 8}
    blocks = [block for block in (first, second, first, second) for _ in range(5)]
    assert metered([model], step, blocks) == [hand[block] for block in blocks]


def test_a_step_of_maml_of_second_order_is_counted_once() -> None:
    model = linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        weights = dict(model.named_parameters())
        loss = torch.func.functional_call(model, weights, (torch.randn(3, 8),)).square().sum()
        gradients = torch.autograd.grad(loss, [*weights.values()], create_graph=True)
        fast = {name: weights[name] - 0.1 * gradient for name, gradient in zip(weights, gradients, strict=True)}
        torch.func.functional_call(model, fast, (torch.randn(3, 8),)).square().sum().backward()
        optimizer.step()

    with Meter(model) as meter:
        for _ in range(10):
            with meter.step():
                step()
        # Forward and gradient of either loss; behind the first gradient, its own to the output and on to the weight.
        assert flops(meter) == [6 * 2 * 3 * 8 * 4] * 10
        assert ["counted" in record.left_out for record in meter.records] == [True] + [False] * 9


def test_maml_of_second_order_with_inner_steps_of_varying_number() -> None:
    """The last backward pass goes through all of them, though each has had its gradient taken."""
    model = linear(8, 3)
    inner = [(1, 3), (3, 1), (2, 2), (1, 2), (2, 1), (3, 3)] * 3

    def step(tasks: tuple[int, int]) -> None:
        x, losses = torch.randn(6, 8), []
        for steps in tasks:
            weight: torch.Tensor = model.weight
            for _ in range(steps):
                loss = torch.func.functional_call(model, {"weight": weight}, (x,)).square().sum()
                (gradient,) = torch.autograd.grad(loss, [weight], create_graph=True)
                weight = weight - 0.1 * gradient
            losses.append(torch.func.functional_call(model, {"weight": weight}, (x,)).square().sum())
        torch.stack(losses).sum().backward()

    # An inner step: forward, gradient, and both differentiated once more; the outer one: forward and backward.
    assert metered([model], step, inner) == [sum(4 * steps + 2 for steps in tasks) * 2 * 6 * 8 * 3 for tasks in inner]


# --- sizes that shapes do not show ------------------------------------------------------------------------------------
def test_a_dimension_that_vmap_hides_is_seen() -> None:
    model = linear(8, 3)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,)).sum()

    def step(rows: int) -> None:
        torch.vmap(torch.func.grad(loss), (None, 0))(weights, torch.randn(rows, 8))

    assert metered([model], step, ROWS) == [n * 2 * 2 * 8 * 3 for n in ROWS]


@pytest.mark.parametrize("batched", [True, False], ids=["rows of one", "single rows"])
def test_samples_are_those_that_vmap_hides(batched: bool) -> None:
    """Gradients of each sample, as functorch's guide takes them."""
    model = linear(8, 3)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x[None] if batched else x,)).sum()

    with Meter(model) as meter:
        for rows in ROWS:
            with meter.step():
                torch.vmap(torch.func.grad(loss), (None, 0))(weights, torch.randn(rows, 8))
    assert [record.samples for record in meter.records] == [*ROWS]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_input_is_told_by_its_number_of_values(layout: torch.layout) -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(16, 4)

        def forward(self, edges: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(edges, self.layer(x))

    def edges(values: int) -> torch.Tensor:
        places = torch.stack([torch.arange(values) % 20, torch.arange(values) // 20])
        return torch.sparse_coo_tensor(places, torch.ones(values), (20, 20)).to_sparse(layout=layout)

    model = Convolution()
    counts = [100, 100, 100, 50, 100, 50]
    found = metered([model], lambda values: model(edges(values), torch.randn(20, 16)).sum().backward(), counts)
    assert found == [2 * (2 * 20 * 16 * 4) + 2 * (2 * values * 4) for values in counts]


def test_what_runs_last_is_told_by_what_ends_it() -> None:
    """A metric behind the optimizer's step, and behind the backward pass in steps without one."""
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Meter(model, skip=0) as meter:
        for i in range(40):
            with meter.step():
                out = model(torch.ones(2, 8))
                out.sum().backward()
                if i % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
                out.detach() @ torch.ones(4, 4)
        meter.summary()
        counted = [i for i, record in enumerate(meter.records) if "counted" in record.left_out]
        assert [record.model_flops for record in meter.records] == [2 * (2 * 2 * 8 * 4) + 2 * 2 * 4 * 4] * 40
    assert counted == [0, 4, 8, 11]
