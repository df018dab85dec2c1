"""A count that folds repeated blocks is the count that runs each, in every field, whatever the blocks do."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from flopprof import FlopCounter, count
from folds import WIDTH, Block, Indexed, N, Stack, blocks, folds, same, stack, to_meta, x
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_counts_the_same_folded(name: str, training: bool, backward: bool) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    same(model.to("meta").train(training), *to_meta(inputs), backward=backward)


def test_like_blocks_run_once_and_each_is_charged() -> None:
    model = stack()
    assert same(model, x()) == blocks(*range(1, N))
    assert same(model, x(), backward=True) == blocks(*range(1, N))
    # each of 2 products: 2 x 3 x 4 x 8, and in backward both gradients of each
    profile = count(model, x(), backward=True)
    assert profile.by_module("forward", depth=2, own=False)["blocks.4"] == 2 * 2 * 3 * WIDTH * 8
    assert profile.backward_flops == 2 * profile.forward_flops
    assert profile.by_parameter()["blocks.5.up.weight"] == 3 * 2 * 3 * WIDTH * 8


def test_many_like_blocks_are_proved_on_the_last() -> None:
    assert same(stack(n=9), x(), backward=True) == blocks(*range(1, 8))


def test_an_index_that_nobody_looks_at_is_proved_on_the_second_and_the_last() -> None:
    assert same(stack(Indexed), x(), backward=True) == blocks(2, 3, 4)


@pytest.mark.parametrize("wants", [False, True])
def test_the_first_gradient_may_be_unwanted(wants: bool) -> None:
    assert len(same(stack(), x(wants=wants), backward=True)) >= N - 2


def test_blocks_without_gradients_fold_in_every_mode() -> None:
    model = stack()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(model, x(wants=False)) == blocks(*range(1, N))


def test_frozen_and_half_frozen_blocks() -> None:
    frozen = stack().requires_grad_(False)
    assert same(frozen, x(), backward=True) == blocks(*range(1, N))
    assert same(frozen, x(wants=False)) == blocks(*range(1, N))
    half = stack()
    for block in half.blocks[:3]:  # type: ignore[index]
        block.requires_grad_(False)
    assert same(half, x(), backward=True) == blocks(1, 2, 4, 5)


def test_an_optimizer_finds_the_gradients_of_folded_blocks() -> None:
    model = stack()
    for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)):
        assert same(model, x(), optimizer=optimizer) == blocks(*range(1, N))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_repeated_parts_fold_inside_blocks_that_run() -> None:
    def kind(index: int) -> nn.Module:
        return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(WIDTH, WIDTH))

    assert same(stack(kind), x(), backward=True) == ["blocks.0.1", "blocks.0.2", *blocks(*range(1, N))]


def test_tuples_dictionaries_and_inputs_pass_through() -> None:
    class Tuple(Block):
        def forward(self, x: torch.Tensor, bias: torch.Tensor, *, names: dict[str, Any]) -> Any:
            return super().forward(x + bias), {"bias": bias, "size": x.shape[0], "none": None}

    class Passing(Stack):
        def forward(self, x: torch.Tensor) -> Any:
            bias, x = x * 2, x * 2
            for block in self.blocks:
                x, out = block(x, bias, names={"a": [1, 2.0, "b"]})
                bias = out["bias"]
            return x, out

    model = Passing(Tuple, 9).to("meta")
    assert same(model, x()) == blocks(*range(1, 8))
    # the bias gets a gradient from each block: all but the one whose gradient comes first are added to it
    assert same(model, x(), backward=True) == blocks(*range(1, 8))


def test_called_twice_each() -> None:
    class Twice(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    model = Twice().to("meta")
    assert same(model, x()) == blocks(*range(1, N)) * 2
    assert same(model, x(), backward=True) == blocks(*range(1, N)) * 2


def test_a_rate_that_grows_from_block_to_block() -> None:
    class Dropping(Block):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.drop = nn.Dropout(index / 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(super().forward(x))

    model = stack(Dropping)
    assert same(model.eval(), x(), backward=True) == blocks(3, 4)  # 0 is no rate; of the others two prove
    assert same(model.train(), x(), backward=True) == blocks(3, 4)


class Cache:
    """Keys of each layer, as language models keep them."""

    class Layer:
        def __init__(self) -> None:
            self.keys: torch.Tensor | None = None
            self.started = False

    def __init__(self, n: int) -> None:
        self.layers = [Cache.Layer() for _ in range(n)]

    def update(self, keys: torch.Tensor, index: int) -> torch.Tensor:
        layer = self.layers[index]
        layer.keys = keys if not layer.started else torch.cat([layer.keys, keys])
        layer.started = True
        return layer.keys


class Caching(Indexed):
    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return super().forward(x) + cache.update(self.up(x), self.layer_idx).sum()


class Cached(Stack):
    steps = 1

    def forward(self, x: torch.Tensor) -> Any:
        cache, x = Cache(len(self.blocks)), x * 2
        for _ in range(self.steps):
            for block in self.blocks:
                x = block(x, cache)
        return x, *self.read(cache)

    def read(self, cache: Cache) -> Any:
        return ()


def test_a_cache_with_a_place_for_each_layer() -> None:
    model = Cached(Caching).to("meta")
    assert same(model, x(), backward=True) == blocks(2, 3, 4)
    model.steps = 3
    assert same(model, x()) == blocks(2, 3, 4) * 3


def test_a_cache_that_is_read_afterwards() -> None:
    class Reading(Cached):
        def read(self, cache: Cache) -> Any:
            return [layer.keys @ layer.keys.T for layer in cache.layers if layer.keys is not None]

    model = Reading(Caching).to("meta")
    assert same(model, x()) == blocks(2, 3, 4)
    assert same(model, x(), backward=True)[:3] == blocks(2, 3, 4)


def test_a_loss_that_weighs_parameters() -> None:
    model = stack()

    def decay(output: torch.Tensor) -> torch.Tensor:
        return output.sum() + sum((p @ p.T).sum() for p in model.parameters() if p.dim() == 2)

    same(model, x(), loss=decay)


def test_an_outer_counter_sees_every_block() -> None:
    model = stack()
    with FlopCounter(model) as outer, folds() as names:
        inner = count(model, x(), backward=True)
    assert names == []
    assert outer.profile.model_flops == inner.model_flops


def test_nothing_is_folded_off_meta() -> None:
    model = Stack()
    with folds() as names:
        count(model, torch.randn(3, WIDTH), backward=True, fold=True)
    assert names == []


def test_the_model_is_left_as_it_was() -> None:
    model = stack(Indexed)
    before = [OrderedDict(vars(module)) for module in model.modules()]
    call = nn.Module._call_impl
    count(model, x(), backward=True)
    assert [OrderedDict(vars(module)) for module in model.modules()] == before
    assert all(type(block.layer_idx) is int for block in model.blocks)  # type: ignore[union-attr]
    assert nn.Module._call_impl is call
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_of_the_model_is_its_own() -> None:
    class Failing(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise ZeroDivisionError("mine")

    model = Failing().to("meta")
    with pytest.raises(ZeroDivisionError, match="mine"):
        count(model, x())
    assert same(stack(), x()) == blocks(*range(1, N))
