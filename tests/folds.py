"""Counting with and without folding: the profiles must be equal in every field; and stacks of blocks to fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from conservation import conserved
from flopprof import count
from flopprof.counting import fold_call
from flopprof.profile import Profile

N, WIDTH = 6, 4


def to_meta(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tree)


@contextmanager
def folds() -> Iterator[list[str]]:
    """The names of modules whose call was not run while this was open, in order."""
    names: list[str] = []
    original = fold_call.Outcome.again

    def again(self: Any, call: Any, *args: Any) -> Any:
        names.append(call.member.fqn)
        return original(self, call, *args)

    fold_call.Outcome.again = again  # type: ignore[method-assign]
    try:
        yield names
    finally:
        fold_call.Outcome.again = original  # type: ignore[method-assign]


def same(model: Callable[..., Any], *args: Any, **how: Any) -> list[str]:
    """The names of the modules that were folded, when the count was found to be what it is without."""
    with folds() as names:
        profile = conserved(count(model, *args, **how))
    with folds() as none:
        plain = count(model, *args, fold=False, **how)
    assert none == []
    assert_equal(profile, plain)
    return names


def assert_equal(folded: Profile, plain: Profile) -> None:
    for name in folded.__struct_fields__:
        mine, theirs = getattr(folded, name), getattr(plain, name)
        if isinstance(mine, tuple) and mine != theirs:
            assert [row for row in mine if row not in theirs] == []
            assert [row for row in theirs if row not in mine] == []
        assert mine == theirs, name
    assert folded == plain


class Block(nn.Module):
    """A residual two-layer block."""

    def __init__(self, index: int = 0, **settings: Any) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x + self.down(self.act(self.up(x)))


class Indexed(Block):
    """A block that knows its place."""

    def __init__(self, index: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.layer_idx = index


class Stack(nn.Module):
    """Blocks one after the other, of one class."""

    def __init__(self, kind: Callable[[int], nn.Module] = Block, n: int = N) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(index) for index in range(n))

    def forward(self, x: torch.Tensor) -> Any:
        x = x * 2  # no leaf, as what every later block gets
        for block in self.blocks:
            x = block(x)
        return x


def stack(kind: Callable[[int], nn.Module] = Block, n: int = N) -> nn.Module:
    return Stack(kind, n).to("meta")


def x(*, wants: bool = True) -> torch.Tensor:
    return torch.randn(3, WIDTH, device="meta", requires_grad=wants)


def blocks(*numbers: int) -> list[str]:
    return [f"blocks.{number}" for number in numbers]
