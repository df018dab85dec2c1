"""Models for comparisons across processes: one that kills its process, one that waits."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn


class Small(nn.Module):
    """(2, 8) -> (2, width)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(8, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def dies() -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    return Small()


def waits() -> nn.Module:
    time.sleep(60)
    return Small()


def talks() -> nn.Module:
    print("a model that talks")
    return Small()
