"""What a formula may read of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Shaped(Protocol):
    """A tensor's sizes; torch's own tensors satisfy it, and so does anything with a shape."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes, outermost first."""

    def numel(self) -> int:
        """Product of the sizes."""

    def dim(self) -> int:
        """Number of sizes."""
