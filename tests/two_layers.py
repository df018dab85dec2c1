"""A model of two layers without biases, for the tests of what stands before its calls."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """8 to 16 to 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())
