"""A model whose only operator has no formula."""

from __future__ import annotations

import torch
from torch import nn


@torch.library.custom_op("flopprof_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    """Computes in numpy, where no dispatcher sees it."""
    return torch.from_numpy(x.detach().numpy() @ x.detach().numpy())


class Opaque(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return opaque(x)
