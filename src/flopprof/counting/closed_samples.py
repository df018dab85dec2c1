"""Counts at chosen sizes: what is alike in all of them, and the integers that differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from flopprof.counting.closed_places import Inputs, Sizes
from flopprof.profile import Profile
from flopprof.symbolic import integers, replaced

CountAt = Callable[[tuple[Any, ...], dict[str, Any]], Profile]


class NotProved(Exception):
    """No form, for this reason; a sentence that goes on after `no closed form is proved: `."""


@dataclass(frozen=True)
class Sample:
    """One count: its rows without their integers, and these; or what the model raised at these sizes."""

    structure: Hashable = None
    values: tuple[Any, ...] = ()
    profile: Profile | None = None
    error: Exception | None = None


class Samples:
    """Counts by their sizes, each made once."""

    def __init__(self, count_at: CountAt, inputs: Inputs) -> None:
        self._count_at = count_at
        self.inputs = inputs
        self._made: dict[Sizes, Sample] = {}

    def at(self, sizes: Sizes) -> Sample:
        """The count at these sizes; what the model raises is in `error`."""
        sample = self._made.get(sizes)
        if sample is None:
            try:
                args, kwargs = self.inputs.at(sizes)
                profile = self._count_at(args, kwargs)
                structure, values = taken_apart(profile)
                sample = Sample(structure, values, profile)
            except Exception as error:  # whatever a model does at sizes that are not its own
                sample = Sample(error=error)
            self._made[sizes] = sample
        return sample

    def at_one(self, i: int) -> Samples:
        """The counts where one size is 1, by the other sizes."""
        inner = Samples(self._count_at, self.inputs.fixed(i, 1))
        inner.at = lambda sizes: self.at((*sizes[:i], 1, *sizes[i:]))  # type: ignore[method-assign]
        return inner

    def accepts(self, sizes: Sizes) -> bool:
        """Does the model run at these sizes?"""
        return self.at(sizes).error is None

    def accepted(self, sizes: Sizes) -> Sample:
        """The count at these sizes. Raises NotProved where there is none."""
        if not self.accepts(sizes):
            raise NotProved(f"the model does not run at every size: {self.why(sizes)}")
        return self.at(sizes)

    def why(self, sizes: Sizes) -> str:
        """What the model raised there, in one line."""
        error = self.at(sizes).error
        lines = str(error).strip().splitlines() or [""]
        return f"at {self.inputs.spell(sizes)} it raises {type(error).__name__}: {lines[0][:200]}"


def rows_of(profile: Profile) -> tuple[Any, Any, Any, Any, Any]:
    """The rows of a profile, in the order in which forms hold them."""
    return (
        tuple(profile.modules),
        tuple(profile.operators),
        tuple(profile.elementwise),
        tuple(profile.uncounted_rows),
        tuple(profile.experts),
    )


def taken_apart(profile: Profile) -> tuple[Hashable, tuple[int, ...]]:
    """(rows with a 0 in the place of every integer, the integers in order)."""
    rows = rows_of(profile)
    return replaced(rows, lambda _: 0), tuple(integers(rows))


def put_together(structure: Any, numbers: tuple[int, ...]) -> tuple[Any, Any, Any, Any, Any]:
    """The rows of this structure with these integers."""
    rest = iter(numbers)
    rows: tuple[Any, Any, Any, Any, Any] = replaced(structure, lambda _: next(rest))
    return rows
