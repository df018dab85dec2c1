"""Models that do more with their blocks than call one after the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from folds import WIDTH, Block, N, Stack, same, x

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

COLLECTED: list[torch.Tensor] = []


class Outside(Stack):
    """The model does something with its blocks besides calling them one after the other."""

    def __init__(self, how: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.how = [how]

    def forward(self, x: torch.Tensor) -> Any:
        return self.how[0](self, x)


def collects(model: Outside, x: torch.Tensor) -> Any:
    return [x := block(x) for block in model.blocks]


def collects_some(model: Outside, x: torch.Tensor) -> Any:
    outputs = [x := block(x) for block in model.blocks]
    return outputs[-1], outputs[2]


def skips(model: Outside, x: torch.Tensor) -> Any:
    outputs = [x := block(x) for block in model.blocks]
    return outputs[-1] + outputs[0] + outputs[3] @ torch.ones(WIDTH, WIDTH, device="meta")


def stops_the_gradient(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        x = block(x).detach() if number == 2 else block(x)
    return x


def drops_one(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        y = block(x)
        x = x if number == 3 else y
    return x


def without_gradients(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        with torch.set_grad_enabled(number != 3):
            x = block(x)
    return x


def grows(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        x = block(torch.cat([x, x]) if number == 3 else x)
    return x


def takes_a_part(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return model.blocks[3].down(model.blocks[3].up(x))


def takes_a_part_first(model: Outside, x: torch.Tensor) -> Any:
    x = model.blocks[0].down(model.blocks[0].up(x))
    for block in model.blocks:
        x = block(x)
    return x


def takes_a_parameter(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return x @ model.blocks[3].up.weight.T


def takes_the_templates_parameter(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return x @ model.blocks[0].up.weight.T


def passes_parameters(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x + model.blocks[0].down.bias)
    return x


def calls_again(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return model.blocks[0](x)


def calls_another_again(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return model.blocks[3](x)


def checkpoints(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def checkpoints_reentrantly(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def checkpoints_pairs(model: Outside, x: torch.Tensor) -> Any:
    for number in range(0, N, 2):
        x = checkpoint(lambda x, n=number: model.blocks[n + 1](model.blocks[n](x)), x, use_reentrant=False)
    return x


def drops_layers(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        if random.random() < 0.7:
            x = block(x)
    return x


def forces(model: Outside, x: torch.Tensor) -> Any:
    y = x
    for block in model.blocks:
        y = block(y)
    return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def maps(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = torch.func.vmap(block)(x)
    return x


def writes_after(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = F.relu_(block(x))
    return x


def transposes(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        x = block(x.T.contiguous().T if number == 3 else x)
    return x


def catches(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    try:
        return model.blocks[3].down(model.blocks[3].up(x))
    except Exception:
        return x


@pytest.mark.parametrize(
    "how",
    [
        collects, collects_some, skips, stops_the_gradient, drops_one, without_gradients, grows, takes_a_part,
        takes_a_part_first, takes_a_parameter, takes_the_templates_parameter, passes_parameters, calls_again,
        calls_another_again, checkpoints, checkpoints_reentrantly, checkpoints_pairs, drops_layers, forces, maps,
        writes_after, transposes, catches,
    ],
)  # fmt: skip
def test_a_model_that_does_more_with_its_blocks(how: Callable[[Any, torch.Tensor], Any]) -> None:
    model = Outside(how).to("meta")
    for backward in (False, True):
        random.seed(0)
        names = same(model, x(), backward=backward)
        if how in (collects, writes_after, without_gradients, grows):
            assert names


def test_each_block_gets_a_parameter_of_its_own() -> None:
    class Biased(Stack):
        def __init__(self) -> None:
            super().__init__(Given)
            self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(N))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block, weight in zip(self.blocks, self.weights, strict=True):
                x = block(x, weight)
            return x

    class Given(Block):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ weight

    assert same(Biased().to("meta"), x(), backward=True) == []


def test_blocks_that_hand_tensors_over_behind_the_models_back() -> None:
    class Collecting(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            COLLECTED.append(y)
            return y

    class Summing(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            COLLECTED.clear()
            x = super().forward(x)
            return x + sum(y @ y.T for y in COLLECTED).sum()  # type: ignore[union-attr]

    model = Summing(Collecting).to("meta")
    for backward in (False, True):
        assert same(model, x(), backward=backward) == []


def test_a_list_among_the_arguments_that_blocks_fill() -> None:
    class Filling(Block):
        def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
            seen.append(x)
            return super().forward(x) + sum(seen)

    class Filled(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            for block in self.blocks:
                x = block(x, seen)
            return x

    assert same(Filled(Filling).to("meta"), x(), backward=True) == []
