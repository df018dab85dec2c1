"""What a formula may know of an operand, and of the gradients that autograd wants."""

from __future__ import annotations

from typing import Protocol

Wanted = tuple[bool, ...] | None
"""Which edges of the running autograd node need a gradient; None: not known, so all."""


class Tensor(Protocol):
    """Anything with a shape: a real tensor on any device, a fake one, a stand-in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, one per dimension."""
