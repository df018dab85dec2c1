"""Models that are hard to attribute: (model, own forward FLOPs by module).

A linear layer n -> n on r rows without bias is one product, 2 r n n; its backward as many again for its weight, and for
its input where that wants a gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ROWS, WIDTH = 2, 3
L = 2 * ROWS * WIDTH * WIDTH
# A product of the input with its own transpose, (rows, width) @ (width, rows).
S = 2 * ROWS * ROWS * WIDTH


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
