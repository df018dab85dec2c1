"""Closed forms: counts at a few sizes, or with symbolic sizes, made into forms that are proved on other counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from flopprof.counting.closed_fit import grids, interpolated
from flopprof.counting.closed_places import Inputs, Sizes
from flopprof.counting.closed_proof import Claim, proved
from flopprof.counting.closed_samples import CountAt, NotProved, Sample, Samples, put_together
from flopprof.counting.closed_shapes import recognised, symbolic
from flopprof.forms import Condition, Form
from flopprof.profile import Profile
from flopprof.symbolic import Forms

# Beyond four times the largest size of a fit, of mixed remainders. Sizes far out cost nothing on meta.
_PROOFS = ((4, 1), (5, 4), (7, 2), (10, 7), (16, 0), (32, 3), (64, 5))
_LARGE = (2048, 4099, 5002)
# From the hints of symbolic sizes on, where their forms are told apart.
_OFFSETS = (0, 3, 10, 37, 85, 131, 202)


def closed(
    count_at: CountAt,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Mapping[str, Any],
    *,
    count_symbolic: CountAt | None = None,
) -> Profile:
    """The count of these arguments, with `forms`: closed forms in the sizes that `dynamic` names, or why none.

    count_at        (args, kwargs) -> Profile: a count at the sizes that these have
    dynamic         name -> (argument, dimension), or a list of them; an argument is a position or a keyword
    count_symbolic  the same as count_at, for fake tensors with symbolic sizes; by default count_at itself

    Polynomials are interpolated first. Where none is proved, symbolic sizes give forms with floors, and the guards on
    them conditions. Either is compared with counts at sizes that it was not made from, row by row.
    Raises UsageError for a name or place that is none, and what the model raises on the arguments as they are.
    """
    inputs = Inputs(args, kwargs, dynamic)
    profile = count_at(args, dict(kwargs))
    samples = Samples(count_at, inputs)
    return msgspec.structs.replace(profile, forms=_forms(samples, count_symbolic or count_at))


def _forms(samples: Samples, count_symbolic: CountAt) -> Forms:
    names = tuple(symbol.name for symbol in samples.inputs.symbols)
    reasons: list[str] = []
    for attempt in (_polynomials, _floors):
        try:
            forms = attempt(samples, count_symbolic)
        except NotProved as error:
            reasons.append(str(error))
        else:
            return msgspec.structs.replace(forms, at_one=tuple(_at_one(samples, count_symbolic, forms)))
    return Forms(symbols=names, reason="; with symbolic sizes: ".join(dict.fromkeys(reasons)) + ".")


def _at_one(samples: Samples, count_symbolic: CountAt, forms: Forms) -> Iterator[tuple[str, Forms]]:
    """Forms of their own where a size of 1 alone runs other operators."""
    for i, symbol in enumerate(samples.inputs.symbols):
        if Condition(Form.of(symbol.name), ">=", 2) in forms.conditions:
            inner = _forms(samples.at_one(i), count_symbolic)
            if not inner.reason:
                yield symbol.name, inner


def _units(samples: Samples) -> list[int]:
    """For each symbol, the step between sizes that the model accepts: 1, or what they must be multiples of."""
    example = samples.inputs.example
    units = []
    for i, (size, symbol) in enumerate(zip(example, samples.inputs.symbols, strict=True)):
        steps = [step for step in range(1, min(size, 128) + 1) if size % step == 0]

        def accepts(other: int, i: int = i) -> bool:
            return samples.accepts((*example[:i], other, *example[i + 1 :]))

        unit = next((step for step in steps if accepts(size + step) or (size > step and accepts(size - step))), None)
        if unit is None:
            other = (*example[:i], size + 1, *example[i + 1 :])
            raise NotProved(
                f"the model runs at no other {symbol.name} while the rest is as given: {samples.why(other)}"
            )
        units.append(unit)
    return units


def _polynomials(samples: Samples, _: CountAt) -> Forms:
    units = [1] * len(samples.inputs.symbols)
    try:
        return _fitted(samples, units)
    except NotProved:
        known = _units(samples)
        if known == units:
            raise
        return _fitted(samples, known)


def _fitted(samples: Samples, units: list[int]) -> Forms:
    reason: NotProved | None = None
    for grid in grids(samples, units):
        try:
            sample, forms, largest = interpolated(samples, grid)
            base = tuple(sizes[0] for sizes in grid)
            trials = tuple(_beyond(size, unit, samples) for size, unit in zip(largest, units, strict=True))
            claim = Claim(_claimed(samples, sample, forms), base, trials, tuple(4 * size for size in largest))
            return _covering(proved(samples, claim, units), samples)
        except NotProved as error:
            reason = reason or error
    assert reason is not None
    raise reason


def _beyond(largest: int, unit: int, samples: Samples) -> tuple[int, ...]:
    """Sizes to prove a fit at, from four times its largest on."""
    proofs = _PROOFS if samples.inputs.on_meta else _PROOFS[:3]
    sizes = [largest * factor + offset * unit for factor, offset in proofs]
    if samples.inputs.on_meta:
        sizes += [size // unit * unit for size in _LARGE]
    return tuple(sorted({size for size in sizes if size >= 4 * largest}))


def _floors(samples: Samples, count_symbolic: CountAt) -> Forms:
    units = _units(samples)
    example = samples.inputs.example
    hints = _hints(samples, units)
    possible, conditions = symbolic(count_symbolic, samples.inputs, hints)
    points = [
        # of different remainders for each symbol
        tuple(
            hint + unit * _OFFSETS[(j * (i + 1)) % len(_OFFSETS)]
            for i, (hint, unit) in enumerate(zip(hints, units, strict=True))
        )
        for j in range(len(_OFFSETS))
    ]
    sample, forms = recognised(samples, possible, points)
    trials = tuple(_around(size, unit, samples) for size, unit in zip(example, units, strict=True))
    claimed = _claimed(samples, sample, forms, conditions)
    return _covering(proved(samples, Claim(claimed, hints, trials, example), units), samples)


def _covering(forms: Forms, samples: Samples) -> Forms:
    """Forms that hold at the sizes of the arguments too, but for a size of 1. Raises NotProved for others."""
    sizes = {s.name: max(s.example, 2) for s in samples.inputs.symbols}
    outside = [str(condition) for condition in forms.conditions if not condition.holds(sizes)]
    if outside:
        raise NotProved(f"a form that fits some sizes holds only where {', '.join(outside)}")
    return forms


def _hints(samples: Samples, units: list[int]) -> Sizes:
    """Sizes without a meaning of their own: odd in units, distinct, large."""
    example = samples.inputs.example
    for more in (67, 13, 2) if samples.inputs.on_meta else (2,):
        hints = tuple(
            ((size // unit + more * (i + 1)) // 2 * 2 + 1) * unit
            for i, (size, unit) in enumerate(zip(example, units, strict=True))
        )
        if samples.accepts(hints):
            return hints
    return example


def _around(size: int, unit: int, samples: Samples) -> tuple[int, ...]:
    """Sizes of every remainder around the given one, and far above it."""
    steps = size // unit
    near = [steps + step for step in (1, 2, 3, 5, 8)] + [2 * steps - 1, 2 * steps + 4]
    far = [4 * steps + 1, 5 * steps + 4, 7 * steps + 2, 16 * steps + 7] if samples.inputs.on_meta else []
    return tuple(sorted({unit * step for step in (*near, *far)}))


def _claimed(
    samples: Samples, sample: Sample, forms: tuple[Form, ...], conditions: tuple[Condition, ...] = ()
) -> Forms:
    pool = {form: position for position, form in enumerate(dict.fromkeys(forms))}
    rows = put_together(sample.structure, tuple(pool[form] for form in forms))
    names = tuple(symbol.name for symbol in samples.inputs.symbols)
    return Forms.summed(names, conditions, tuple(pool), rows)
