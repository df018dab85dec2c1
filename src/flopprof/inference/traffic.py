"""What one decoded token of each sequence must move, as a function of the batch; and where it meets a device's peaks.

Exact: in integers and fractions. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import msgspec


class Routed(msgspec.Struct, frozen=True, kw_only=True):
    """Weights in `experts` shares of `bytes_each`, of which a token takes `chosen`; flops: of one token's products."""

    experts: int
    chosen: int
    bytes_each: int
    flops: int

    def expected(self, tokens: int) -> Fraction:
        """Expected bytes of the shares that at least one of so many tokens takes.

        Each token takes `chosen` different ones, every set of them equally likely and independently of the others, so
        that a share is left by all with the probability (1 - chosen / experts) ** tokens.
        """
        left = Fraction(self.experts - self.chosen, self.experts) ** tokens
        return self.bytes_each * self.experts * (1 - left)


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one step moves, and its FLOPs for each sequence: weights once for all, the rest for each.

    weight_bytes      read whatever the batch; a weight that is used twice is read twice
    row_bytes         rows of tables that each token looks up
    routed            experts
    cache_read_bytes  what a sequence's cache holds before the step
    cache_written_bytes  the new token's entry, and states as a whole
    """

    flops: int
    weight_bytes: int
    row_bytes: int
    cache_read_bytes: int
    cache_written_bytes: int
    routed: tuple[Routed, ...] = ()

    @property
    def sequence_bytes(self) -> int:
        """What each sequence of a batch adds."""
        return self.row_bytes + self.cache_read_bytes + self.cache_written_bytes

    def weights_at(self, tokens: int) -> Fraction:
        """Expected bytes of weights that a step of so many tokens reads."""
        return self.weight_bytes + sum((share.expected(tokens) for share in self.routed), Fraction(0))

    def bytes_at(self, batch: int) -> Fraction:
        """Expected bytes that a step of this batch moves."""
        return self.weights_at(batch) + batch * self.sequence_bytes

    def compute_bound_from(self, flops_per_s: Fraction, bytes_per_s: Fraction) -> int | None:
        """The least batch whose FLOPs take at least as long as its bytes; None where no batch is.

        FLOPs grow with the batch, weights do not, but the cache does: time by FLOPs less time by bytes is convex in the
        batch and not positive at none. So it passes 0 at most once, and only if a sequence's FLOPs take longer than its
        own bytes.
        """
        if self.flops * bytes_per_s <= self.sequence_bytes * flops_per_s:
            return None
        return _first(lambda batch: batch * self.flops * bytes_per_s >= self.bytes_at(batch) * flops_per_s)

    @property
    def most_intensity(self) -> Fraction | None:
        """FLOPs per byte that no batch exceeds; None where a sequence moves no bytes of its own."""
        return Fraction(self.flops, self.sequence_bytes) if self.sequence_bytes else None


def _first(holds: Callable[[int], bool]) -> int:
    """The least positive number that holds, where every later one does too."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
