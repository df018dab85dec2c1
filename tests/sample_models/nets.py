"""Models that the command-line tests count; every total is worked out in the test that uses it."""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    """(n, 8) -> (n, 4) through 16 hidden units."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Stack(nn.Module):
    """Six equal blocks in a ModuleList, then a product that no module makes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6))
        self.scale = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x @ self.scale


class NeedsArgument(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class DataDependent(nn.Module):
    """Its work depends on values, which the meta device does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.abs().sum().numpy() >= 0):
            x = self.linear(x)
        return x


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Explodes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Explodes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the fuse is lit\nand more lines")


class Interrupted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def with_tensor() -> tuple[nn.Module, torch.Tensor]:
    return Mlp(), torch.zeros(2, 8)


def with_tuple() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Mlp(), (torch.zeros(2, 8),)


def with_dict() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Mlp(), {"x": torch.zeros(2, 8)}


def with_batch(batch: int = 1) -> tuple[nn.Module, torch.Tensor]:
    return Mlp(), torch.zeros(batch, 8)


def not_a_module() -> int:
    return 3


def raises() -> nn.Module:
    raise RuntimeError("no such checkpoint")


ready = Mlp()
number = 3
