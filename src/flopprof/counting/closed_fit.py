"""Exact interpolation: the polynomials that go through counts on a grid of sizes, their degrees found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise, product

from flopprof.counting.closed_places import Sizes
from flopprof.counting.closed_samples import NotProved, Sample, Samples
from flopprof.forms import Form

HIGHEST_DEGREE = 3

# Sizes of a grid, in steps of a symbol's unit: of mixed parity and remainders, so that a floor or a pad shows; no two
# symbols share one, so that no two rows coincide. Small, so that four times as much is still accepted.
_STEPS = (
    (5, 8, 11, 18, 27),
    (7, 10, 13, 22, 29),
    (6, 9, 17, 20, 31),
    (12, 15, 19, 26, 33),
    (14, 21, 23, 28, 37),
)


def grids(samples: Samples, units: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """Sizes to fit on, for each symbol: small ones twice, those around the example's, and the smallest."""
    for shift in (0, 2):
        yield [tuple(unit * step for step in _STEPS[(i + shift) % len(_STEPS)]) for i, unit in enumerate(units)]
    yield [
        tuple((size // unit + step - 4) * unit for step in _STEPS[i % len(_STEPS)])
        for i, (unit, size) in enumerate(zip(units, samples.inputs.example, strict=True))
    ]
    yield [tuple(unit * (step + i) for step in (3, 4, 5, 7, 9)) for i, unit in enumerate(units)]


def interpolated(samples: Samples, grid: list[tuple[int, ...]]) -> tuple[Sample, tuple[Form, ...], Sizes]:
    """(a sample, the form of each of its integers, the largest sizes used). Raises NotProved."""
    base = tuple(sizes[0] for sizes in grid)
    first = samples.accepted(base)
    degrees, largest = [], []
    for i, sizes in enumerate(grid):
        for degree in range(HIGHEST_DEGREE + 1):
            line = [(*base[:i], size, *base[i + 1 :]) for size in sizes[: degree + 2]]
            columns = set(zip(*(_alike(samples, at, first).values for at in line), strict=True))
            if all(_is_polynomial(sizes, column, degree) for column in columns):
                degrees.append(degree)
                largest.append(sizes[degree + 1])
                break
        else:
            name = samples.inputs.symbols[i].name
            raise NotProved(f"the counts are no polynomial of degree {HIGHEST_DEGREE} or less in {name}")
    axes = [sizes[: degree + 1] for sizes, degree in zip(grid, degrees, strict=True)]
    points = [_alike(samples, at, first).values for at in product(*axes)]
    names = [symbol.name for symbol in samples.inputs.symbols]
    through = _through(names, axes)
    made: dict[tuple[int, ...], Form] = {}
    integers = list(zip(*points, strict=True))
    for values in integers:
        if values not in made:
            made[values] = through(values)
    return first, tuple(made[values] for values in integers), tuple(largest)


def _alike(samples: Samples, sizes: Sizes, like: Sample) -> Sample:
    sample = samples.accepted(sizes)
    if sample.structure != like.structure:
        raise NotProved(f"other operators run at {samples.inputs.spell(sizes)} than at other sizes")
    return sample


def _is_polynomial(sizes: Sequence[int], values: tuple[int, ...], degree: int) -> bool:
    """Does a polynomial of this degree go through the degree + 2 points? Then their divided difference is 0."""
    row = [Fraction(value) for value in values]
    for order in range(1, degree + 2):
        row = [(after - before) / (sizes[i + order] - sizes[i]) for i, (before, after) in enumerate(pairwise(row))]
    return not row[0]


def _through(names: list[str], axes: list[tuple[int, ...]]) -> Callable[[tuple[int, ...]], Form]:
    """The polynomial through values on the grid of these axes, the last axis running fastest."""
    inverses = [_inverse_vandermonde(axis) for axis in axes]
    exponents = list(product(*(range(len(axis)) for axis in axes)))
    powers = [
        tuple((name, power) for name, power in zip(names, exponent, strict=True) if power) for exponent in exponents
    ]

    def through(values: tuple[int, ...]) -> Form:
        if len(set(values)) == 1:
            return Form.of(values[0])
        table = [Fraction(value) for value in values]
        stride = 1
        for inverse in reversed(inverses):
            table = _along(table, inverse, stride)
            stride *= len(inverse)
        return Form.made(dict(zip(powers, table, strict=True)))

    return through


def _along(table: list[Fraction], matrix: list[list[Fraction]], stride: int) -> list[Fraction]:
    """The table with the matrix applied along the axis of this stride."""
    size = len(matrix)
    result = [Fraction(0)] * len(table)
    for start in range(len(table)):
        if start // stride % size == 0:
            for i, row in enumerate(matrix):
                result[start + i * stride] = sum(
                    (factor * table[start + j * stride] for j, factor in enumerate(row) if factor), Fraction(0)
                )
    return result


def _inverse_vandermonde(points: tuple[int, ...]) -> list[list[Fraction]]:
    """Row i: how much each value at these points has in the coefficient of x**i."""
    columns = []
    for j, point in enumerate(points):
        coefficients = [Fraction(1)]  # of the polynomial that is 1 at this point and 0 at the others
        for other in points[:j] + points[j + 1 :]:
            raised = [Fraction(0), *coefficients]
            lowered = [*(value * other for value in coefficients), Fraction(0)]
            coefficients = [(a - b) / (point - other) for a, b in zip(raised, lowered, strict=True)]
        columns.append(coefficients)
    return [list(row) for row in zip(*columns, strict=True)]
