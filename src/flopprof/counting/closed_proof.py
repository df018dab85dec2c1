"""Forms against counts that they were not made from: where they hold, and whether they hold at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from flopprof.counting.closed_places import Sizes
from flopprof.counting.closed_samples import NotProved, Samples, rows_of
from flopprof.errors import UsageError
from flopprof.forms import Condition, Floor, Form
from flopprof.symbolic import Forms

# Beyond the proofs, one look at each size alone: a threshold up there bounds the forms. Only on meta.
_FAR = 150_001
_JOINT = 6  # proofs in which all sizes vary together
# A model that loops over a size runs as many operators as that is large: then it is proved on fewer and smaller ones.
_MOST_CALLS = 4_000


@dataclass(frozen=True)
class Claim:
    """Forms to be proved.

    base    sizes at which they are known to hold
    trials  for each symbol, sizes to prove them at, ascending
    least   for each symbol, up to which of these they must hold
    """

    forms: Forms
    base: Sizes
    trials: tuple[tuple[int, ...], ...]
    least: Sizes


def proved(samples: Samples, claim: Claim, units: Sequence[int]) -> Forms:
    """The forms with the conditions under which they hold. Raises NotProved."""
    proof = _Proof(samples, claim)
    symbols = samples.inputs.symbols
    bounds = [proof.range(i, unit) for i, unit in enumerate(units)]
    proof.jointly(bounds, units)
    conditions = []
    for symbol, unit, (low, high) in zip(symbols, units, bounds, strict=True):
        size = Form.of(symbol.name)
        if unit > 1:
            conditions.append(Condition(size - size // unit * unit, "==", 0))
        if low > unit:
            conditions.append(Condition(size, ">=", low))
        if high is not None:
            conditions.append(Condition(size, "<=", high))
    lowest = {symbol.name: low for symbol, (low, _) in zip(symbols, bounds, strict=True)}
    for condition in claim.forms.conditions:
        if not _implied(condition, lowest) and not proof.needless(condition):
            conditions.append(condition)
    return msgspec.structs.replace(claim.forms, conditions=tuple(conditions))


class _Proof:
    """Compares forms with counts; remembers where they agreed."""

    def __init__(self, samples: Samples, claim: Claim) -> None:
        self._samples, self._claim = samples, claim
        self._names = claim.forms.symbols
        self._agreed: list[dict[str, int]] = []
        self._calls = claim.forms.total(
            row.calls for rows in (claim.forms.operators, claim.forms.elementwise) for row in rows
        )
        self.trials = tuple(
            [size for n, size in enumerate(trials) if n < 3 or self._cheap(self._with(i, size))]
            for i, trials in enumerate(claim.trials)
        )

    def _cheap(self, sizes: Sizes) -> bool:
        at, base = (dict(zip(self._names, each, strict=True)) for each in (sizes, self._claim.base))
        return self._calls.at(at) <= max(_MOST_CALLS, self._calls.at(base))

    def range(self, i: int, unit: int) -> tuple[int, int | None]:
        """Least and largest size of a symbol at which the forms hold, the others as in the base; None: no largest."""
        base = self._claim.base[i]
        low = unit
        if base > unit and not self.agrees(self._with(i, unit)):
            low = 2 * unit  # mostly a size of 1 alone is an exception
            if not self.agrees(self._with(i, low)):
                low = base - _last(0, base - low, unit, lambda less: self.agrees(self._with(i, base - less)))
        return low, self._highest(i, unit)

    def _highest(self, i: int, unit: int) -> int | None:
        trials, base = self.trials[i], self._claim.base[i]
        far = max(_FAR // unit * unit, trials[-1])
        if not self._samples.inputs.on_meta or not self._cheap(self._with(i, far)):
            far = trials[-1]
        if self.agrees(self._with(i, far)):
            return None
        top = max(base, trials[-1])
        if self._samples.accepts(self._with(i, top)) and (
            not self.covers(self._with(i, far)) or self._guessed(self._with(i, far))
        ):
            return None
        good, bad = (top, far) if far > top and self.agrees(self._with(i, top)) else (base, top)
        high = _last(good, bad, unit, lambda size: self.agrees(self._with(i, size)))
        if high < self._claim.least[i]:
            beyond = self._with(i, high + unit)
            refused = not self._samples.accepts(beyond)
            raise NotProved(
                f"the model runs up to {self._names[i]}={high} only, too near to prove it: {self._samples.why(beyond)}"
                if refused
                else self._refuted(beyond)
            )
        return high

    def _guessed(self, sizes: Sizes) -> bool:
        """Was something guessed there that is not at the base? Then the count tells nothing."""
        found, known = self._samples.at(sizes).profile, self._samples.at(self._claim.base).profile
        return found is not None and known is not None and found.assumptions != known.assumptions

    def _refuted(self, sizes: Sizes) -> str:
        return f"what fits the counts at some sizes is not the count at {self._samples.inputs.spell(sizes)}"

    def jointly(self, bounds: Sequence[tuple[int, int | None]], units: Sequence[int]) -> None:
        """Prove the forms where all sizes vary together. Raises NotProved."""
        choices = [
            [size for size in trials if high is None or size <= high] + ([] if high is None else [high - unit, high])
            for trials, unit, (_, high) in zip(self.trials, units, bounds, strict=True)
        ]
        points = [
            # Large with small: what a model makes of all sizes together must not grow without bound.
            tuple(_spread(sizes, j if i % 2 == 0 else _JOINT - 1 - j) for i, sizes in enumerate(choices))
            for j in range(_JOINT)
        ]
        lows = tuple(low for low, _ in bounds)
        proofs = 0
        for point in (*points, lows):
            if not self.covers(point):
                continue
            proofs += 1
            if not self._samples.accepts(point):
                raise NotProved(f"the model does not run at every size: {self._samples.why(point)}")
            if not self.agrees(point):
                raise NotProved(self._refuted(point))
        if proofs < _JOINT // 2:
            raise NotProved(f"the forms would hold only where {', '.join(map(str, self._claim.forms.conditions))}")

    def needless(self, condition: Condition) -> bool:
        """Is it an exception (`!= 1`, of what torch asks of every size) at which the forms agree with counts too?"""
        return condition.relation == "!=" and any(not condition.holds(sizes) for sizes in self._agreed)

    def covers(self, sizes: Sizes) -> bool:
        """Do the conditions that are no mere exceptions hold there?"""
        given = dict(zip(self._names, sizes, strict=True))
        return all(c.relation == "!=" or c.holds(given) for c in self._claim.forms.conditions)

    def agrees(self, sizes: Sizes) -> bool:
        """Does a count at these sizes have exactly the rows that the forms give?"""
        sample = self._samples.at(sizes)
        if sample.profile is None or not self.covers(sizes):
            return False
        given = dict(zip(self._names, sizes, strict=True))
        try:
            made: Any = tuple(map(tuple, self._claim.forms.rows(given, sample.profile.attention == "causal")))
        except UsageError:  # no whole number
            return False
        counted: Any = rows_of(sample.profile)
        if 1 in sizes:  # attention of one query says of no mask that it is causal; the pairs are the same
            made, counted = _without_masks(made), _without_masks(counted)
        if made != counted:
            return False
        self._agreed.append(given)
        return True

    def _with(self, i: int, size: int) -> Sizes:
        base = self._claim.base
        return (*base[:i], size, *base[i + 1 :])


def _last(good: int, bad: int, unit: int, holds: Callable[[int], bool]) -> int:
    """The last size, in steps of unit, that holds before one that does not, between a good and a bad one."""
    while bad - good > unit:
        middle = good + (bad - good) // (2 * unit) * unit
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def _spread(sizes: Sequence[int], j: int) -> int:
    return sizes[j * len(sizes) // _JOINT % len(sizes)]


def _without_masks(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    operators = tuple(msgspec.structs.replace(row, mask_known=False) for row in rows[1])
    return rows[0], operators, *rows[2:]


def _implied(condition: Condition, lowest: dict[str, int]) -> bool:
    """Is it so at every size from the lowest on, because its left side only grows?"""
    if not _grows(condition.left):
        return False
    start = condition.left.at(lowest)
    return (
        start >= condition.right
        if condition.relation == ">="
        else (condition.relation == "!=" and start > condition.right)
    )


def _grows(form: Form) -> bool:
    return all(
        not powers or (coefficient > 0 and all(not isinstance(a, Floor) or _grows(a.numerator) for a, _ in powers))
        for coefficient, powers in form.terms
    )
