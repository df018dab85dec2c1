"""A function with a backward of its own, for the tests of what is put in the place of torch's functions."""

from __future__ import annotations

from typing import Any

import torch


class Double(torch.autograd.Function):
    """Twice its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2
