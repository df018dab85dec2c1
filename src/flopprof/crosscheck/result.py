"""What a cross-check found: one Reading a counter, its difference from ours split into Gaps. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA = "flopprof.crosscheck/1"

Side = Literal["forward", "backward"]


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Part of a difference: so many FLOPs more (or fewer) than flopprof counts for this operator.

    operator   as the counter calls it, or ours where the counter has none
    reason     why, where the numbers bear a reason out; else empty
    multiples  of our count that they count, smallest and largest, where the reason is one of multiples
    modules    where, in the order of the model
    """

    operator: str
    side: Side
    flops: int
    reason: str = ""
    multiples: tuple[int, int] | None = None
    modules: tuple[str, ...] = ()


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one counter says, in FLOPs.

    own        one of flopprof's own engines
    macs       it counts multiply-adds: doubled here
    absent     why it has no number: not installed, not applicable, or what it raised; else empty
    backward_flops    None where it does not count a backward pass, or none was asked for
    recompute_flops   None where it counts what is computed again, but cannot tell it from the backward
    assumptions       what flopprof's engine had to guess
    difference        from flopprof, over the passes that it counts; gaps and unexplained add up to it
    """

    counter: str
    own: bool = False
    macs: bool = False
    absent: str = ""
    forward_flops: int | None = None
    backward_flops: int | None = None
    recompute_flops: int | None = None
    difference: int | None = None
    gaps: tuple[Gap, ...] = ()
    unexplained: int = 0
    assumptions: tuple[str, ...] = ()


class Disagreement(msgspec.Struct, frozen=True, kw_only=True):
    """A module for which two of flopprof's own engines give different counts."""

    module: str
    side: Side
    engine: str
    flops: int
    expected: int


class Crosscheck(msgspec.Struct, frozen=True, kw_only=True):
    """All counters on one workload; the first reading is what the others are compared with."""

    target: str
    described: str
    backward: bool
    readings: tuple[Reading, ...]
    disagreements: tuple[Disagreement, ...] = ()
    uncounted: dict[str, int] = {}
    schema: str = SCHEMA

    @property
    def agree(self) -> bool:
        """Do flopprof's own engines give every module the same count?"""
        return not self.disagreements

    def to_json(self) -> str:
        """Everything, as JSON of schema `flopprof.crosscheck/1`."""
        return msgspec.json.encode(self).decode()
