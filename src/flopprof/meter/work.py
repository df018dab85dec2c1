"""Work: what a piece of a step multiplied, by rate and phase; and how it is read off a tally. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from flopprof.profile import PHASES, Profile

# The column of a device's peaks depends on the operator, too: cuDNN runs float32 convolutions in tf32 unless told not
# to, matrix products only when told to.
_KINDS = (("conv", "convolution"), ("lstm", "recurrent"), ("gru", "recurrent"), ("rnn", "recurrent"))
Phases = tuple[int, int, int, int]  # forward, backward, recompute, optimizer
_NOTHING: Phases = (0, 0, 0, 0)


class Work(msgspec.Struct, frozen=True):
    """FLOPs by rate (`float32`, `float32:convolution`) and phase, bytes of counted operators, and what has no count."""

    flops: dict[str, Phases] = {}
    bytes_moved: int = 0
    uncounted: dict[str, int] = {}
    assumptions: tuple[str, ...] = ()

    @property
    def model_flops(self) -> int:
        """Forward and backward."""
        return sum(forward + backward for forward, backward, _, _ in self.flops.values())

    @property
    def hardware_flops(self) -> int:
        """Everything executed."""
        return sum(map(sum, self.flops.values()))

    def numbers(self) -> dict[tuple[str, str], int]:
        """Every integer by its name: what a form over shapes is fitted to."""
        table: dict[tuple[str, str], int] = {}
        for rate, row in self.flops.items():
            table |= {(rate, phase): count for phase, count in zip(PHASES, row, strict=True)}
        table["", "bytes"] = self.bytes_moved
        return table | {("uncounted", name): calls for name, calls in self.uncounted.items()}

    @classmethod
    def of_numbers(cls, table: Mapping[tuple[str, str], int], assumptions: tuple[str, ...] = ()) -> Work:
        """The inverse of `numbers`."""
        flops: dict[str, dict[str, int]] = {}
        uncounted: dict[str, int] = {}
        for (kind, name), value in table.items():
            if kind == "uncounted":
                uncounted[name] = value
            elif kind:
                flops.setdefault(kind, {})[name] = value
        rows: dict[str, Phases] = {
            rate: (row["forward"], row["backward"], row["recompute"], row["optimizer"]) for rate, row in flops.items()
        }
        return cls(rows, table["", "bytes"], uncounted, assumptions)


def work_of(profile: Profile, *, optimizer: bool = True) -> Work:
    """The sums of a profile that a meter needs; optimizer: with what it multiplies itself."""
    flops: dict[str, list[int]] = {}
    rows = [row for row in profile.operators if optimizer or row.phase != "optimizer"]
    for row in rows:
        flops.setdefault(rate_of(row.op, row.dtype), [0, 0, 0, 0])[PHASES.index(row.phase)] += row.flops
    return Work(
        {rate: (row[0], row[1], row[2], row[3]) for rate, row in sorted(flops.items()) if any(row)},
        sum(row.bytes for row in rows),
        profile.uncounted,
        profile.assumptions,
    )


def rate_of(op: str, dtype: str) -> str:
    """Which peak an operator's FLOPs are held against: its dtype, and for float32 what kind of operator it is."""
    if dtype not in ("float32", "complex64"):
        return dtype
    name = op.partition("::")[2]
    kind = next((kind for part, kind in _KINDS if part in name), "")
    return f"{dtype}:{kind}" if kind else dtype


def total(parts: Iterable[Work]) -> Work:
    """The sum of pieces of work."""
    flops: dict[str, Phases] = {}
    uncounted: dict[str, int] = {}
    assumptions: dict[str, None] = {}
    moved = 0
    for part in parts:
        for rate, row in part.flops.items():
            before = flops.get(rate, _NOTHING)
            flops[rate] = (before[0] + row[0], before[1] + row[1], before[2] + row[2], before[3] + row[3])
        for name, calls in part.uncounted.items():
            uncounted[name] = uncounted.get(name, 0) + calls
        assumptions.update(dict.fromkeys(part.assumptions))
        moved += part.bytes_moved
    return Work(flops, moved, uncounted, tuple(assumptions))
