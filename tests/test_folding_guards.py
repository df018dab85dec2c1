"""Blocks that must not fold, or not all: each of these would be counted wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flopprof import count
from folds import WIDTH, Block, Indexed, Stack, folds, same, stack, x

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


def used(kind: type[Block]) -> nn.Module:
    return stack(kind)


class EveryThird(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.layer_idx % 3 else super().forward(super().forward(x))


class OnlyFour(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x)) if self.layer_idx in (3,) else super().forward(x)


class OnlyFourOfASet(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x)) if self.layer_idx in {3} else super().forward(x)


class ByName(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x)) if f"{self.layer_idx}" == "3" else super().forward(x)


class Config:
    def __init__(self) -> None:
        self.layer_types = ["thin", "thin", "thin", "thick", "thin", "thin"]


CONFIG = Config()


class ByTable(Indexed):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.config = CONFIG

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thick = self.config.layer_types[self.layer_idx] == "thick"
        return super().forward(super().forward(x)) if thick else super().forward(x)


class ByTableBehind(ByTable):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thick = self.config.layer_types[self.layer_idx - 1] == "thick"
        return Block.forward(self, Block.forward(self, x) if thick else x)


class AsManyAsItsIndex(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.layer_idx):
            x = super().forward(x)
        return x


class Counting(Block):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(super().forward(x)) if type(self).calls % 4 == 0 else super().forward(x)


STATE = {"calls": 0}
COLLECTED: list[torch.Tensor] = []


class CountingInAModule(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        STATE["calls"] += 1
        return super().forward(super().forward(x)) if STATE["calls"] % 4 == 0 else super().forward(x)


class Rates(Block):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.rate = 0.0 if index == 3 else 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), self.rate)


class Random(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if random.random() < 0.5 else x


class RandomOfTorch(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if torch.rand(()).item() < 0.5 else x


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ torch.ones(WIDTH, WIDTH, device="meta")


class OwnFunction(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Double.apply(super().forward(x))


class Viewing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        return x.view(-1).view(x.shape)


class Writing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(super().forward(torch.ones_like(x)))


class Keeping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x)
        return self.kept


class Checkpointing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(lambda y: self.down(self.act(self.up(y))), x, use_reentrant=False)


class Differentiating(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0]


KINDS: dict[str, tuple[type[Block], int]] = {  # and how many of the 6 are folded in the end
    "every third": (EveryThird, -1),
    "only the fourth": (OnlyFour, -1),
    "only the fourth, of a set": (OnlyFourOfASet, 0),
    "by name": (ByName, 0),
    "by a table of the configuration": (ByTable, -1),
    "by the table's place before": (ByTableBehind, -1),
    "as many times as its index": (AsManyAsItsIndex, -1),
    "counting calls in its class": (Counting, 0),
    "counting calls in its Python module": (CountingInAModule, 0),
    "a rate of 0": (Rates, -1),
    "Python's random numbers": (Random, 0),
    "torch's random numbers": (RandomOfTorch, 0),
    "an autograd.Function": (OwnFunction, 0),
    "a view of its input": (Viewing, 0),
    "writing to its input": (Writing, 0),
    "keeping its output": (Keeping, 0),
    "a checkpoint inside": (Checkpointing, 0),
    "a gradient inside": (Differentiating, -1),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_block_of_its_own_mind(name: str) -> None:
    kind, expected = KINDS[name]
    for backward in (False, True):
        Counting.calls = STATE["calls"] = 0
        random.seed(0)
        torch.manual_seed(0)
        model = stack(kind)
        with folds() as names:
            folded = count(model, x(), backward=backward)
        Counting.calls = STATE["calls"] = 0
        assert folded == count(model, x(), backward=backward, fold=False)
        if expected >= 0:
            assert len(names) == expected


def hooked(model: nn.Module) -> nn.Module:
    model.blocks[2].register_forward_hook(lambda module, args, output: output @ torch.ones(WIDTH, WIDTH, device="meta"))  # type: ignore[index]
    return model


def backward_hooked(model: nn.Module) -> nn.Module:
    model.blocks[3].up.weight.register_hook(lambda gradient: gradient @ gradient.T @ gradient)  # type: ignore[index]
    return model


def shared(model: nn.Module) -> nn.Module:
    model.blocks[4].up = model.blocks[1].up  # type: ignore[index]
    return model


def tied(model: nn.Module) -> nn.Module:
    model.blocks[4].up.weight = model.blocks[1].up.weight  # type: ignore[index]
    return model


def patched(model: nn.Module) -> nn.Module:
    block = model.blocks[3]  # type: ignore[index]
    block.forward = lambda x: Block.forward(block, Block.forward(block, x))
    return model


def parametrized(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.blocks[3].up)  # type: ignore[index]
    return model


def evaluating(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.act = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    model.blocks[3].eval()  # type: ignore[index]
    return model


@pytest.mark.parametrize("change", [hooked, backward_hooked, shared, tied, patched, parametrized, evaluating])
def test_one_block_is_not_like_the_others(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(Stack().to("meta"))
    for backward in (False, True):
        names = same(model, x(), backward=backward)
        assert names or change in (shared, tied)
