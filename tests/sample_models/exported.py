"""A layer that multiplies otherwise where it is exported, as some models of transformers do."""

import torch
from torch import nn


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(x) + (self.down(x) if torch.compiler.is_exporting() else 0)
