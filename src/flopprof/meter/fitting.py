"""A polynomial through counts at whatever sizes a loop happened to have: exact, proved on one count it was not made of.

Counts of a training loop lie on no grid, so the coefficients are solved for exactly, in fractions; a form is taken
only where at least one count more than it has coefficients lies on it. It is used between the smallest and the largest
sizes that were counted, on the lattice that they span (a form of even lengths says nothing of odd ones).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, permutations, product

Sizes = tuple[int, ...]
Name = tuple[str, str]
_MOST_SYMBOLS = 3
_HIGHEST = 3


class Fit:
    """A proved form: integers as polynomials in some of the sizes."""

    def __init__(
        self, columns: Sequence[Column], used: Sequence[int], basis: Sequence[Sizes], table: dict[Name, list[Fraction]]
    ) -> None:
        self._columns, self._used, self._basis, self._table = columns, used, basis, table

    def covers(self, sizes: Sizes) -> bool:
        """May these sizes be those of a form that is proved? They may lack the last ones."""
        return all(column.covers(sizes) for column in self._columns)

    def at(self, sizes: Sizes) -> dict[Name, int] | None:
        """Its values there; None where it is not proved."""
        if not self.covers(sizes):
            return None
        point = [sizes[self._columns[i].first] for i in self._used]
        terms = [math.prod(x**power for x, power in zip(point, powers, strict=True)) for powers in self._basis]
        values = {}
        for name, coefficients in self._table.items():
            value = sum((c * term for c, term in zip(coefficients, terms, strict=True)), Fraction(0))
            if value.denominator != 1 or value < 0:
                return None
            values[name] = value.numerator
        return values


class Column:
    """Sizes that went together in every count: all equal, or a constant apart."""

    def __init__(self, first: int, values: Sequence[int]) -> None:
        self.first = first
        self.offsets = {first: 0}
        self.low, self.high = min(values), max(values)
        self.step = math.gcd(*(value - values[0] for value in values))
        self.start = values[0]

    @property
    def constant(self) -> bool:
        """Is it the same in every count?"""
        return self.low == self.high

    def covers(self, sizes: Sizes) -> bool:
        """Do these sizes go together so, between those that were counted and on their lattice?"""
        if self.first >= len(sizes):
            return True
        value = sizes[self.first]
        if not self.low <= value <= self.high or (self.step and (value - self.start) % self.step):
            return False
        return all(sizes[i] - value == offset for i, offset in self.offsets.items() if i < len(sizes))


def fitted(samples: Mapping[Sizes, Mapping[Name, int]]) -> Fit | None:
    """The simplest form through all of these counts that one of them proves; None where there is none."""
    points = list(samples)
    columns = _columns(points)
    varying = [i for i, column in enumerate(columns) if not column.constant]
    names = list(dict.fromkeys(name for values in samples.values() for name in values))
    rows = [[Fraction(samples[point].get(name, 0)) for name in names] for point in points]
    for used, basis in _candidates(varying):
        if len(basis) >= len(points):
            continue
        places = [[point[columns[i].first] for i in used] for point in points]
        matrix = [
            [Fraction(math.prod(x**p for x, p in zip(place, powers, strict=True))) for powers in basis]
            for place in places
        ]
        solution = _solved(matrix, rows)
        if solution is not None:
            table = {name: [line[i] for line in solution] for i, name in enumerate(names)}
            return Fit(columns, used, basis, table)
    return None


def _columns(points: Sequence[Sizes]) -> list[Column]:
    columns: list[Column] = []
    values = [list(column) for column in zip(*points, strict=True)]
    for i, column in enumerate(values):
        for known in columns:
            offset = column[0] - values[known.first][0]
            if not known.constant and all(a - b == offset for a, b in zip(column, values[known.first], strict=True)):
                known.offsets[i] = offset
                break
        else:
            columns.append(Column(i, column))
    return columns


def _candidates(varying: Sequence[int]) -> Iterator[tuple[tuple[int, ...], list[Sizes]]]:
    """(columns used, exponents of each product), the simplest first."""
    found: list[tuple[tuple[int, ...], list[Sizes]]] = [((), [()])]
    for count in range(1, _MOST_SYMBOLS + 1):
        for used in combinations(varying, count):
            found += [(used, basis) for basis in _bases(count)]
    found.append((tuple(varying), [(0,) * len(varying), *_units(len(varying))]))
    yield from sorted(found, key=lambda item: (len(item[1]), len(item[0])))


def _units(count: int) -> list[Sizes]:
    return [tuple(int(i == j) for j in range(count)) for i in range(count)]


def _bases(count: int) -> Iterator[list[Sizes]]:
    if count == 1:
        for degree in range(1, _HIGHEST + 1):
            yield [(power,) for power in range(degree + 1)]
        return
    # Of a batch and lengths: what a sample costs, times their number; with and without a part that does not grow so.
    lengths = [powers for powers in product(range(3), repeat=count - 1) if sum(powers) <= 2]
    for order in permutations(range(count)):
        if list(order[1:]) != sorted(order[1:]):
            continue
        for batch in ((1,), (0, 1), (0, 1, 2)):
            basis = [(power, *rest) for power in batch for rest in lengths]
            yield [tuple(powers[order.index(i)] for i in range(count)) for powers in basis]
    yield list(product(range(2), repeat=count))


def _solved(matrix: list[list[Fraction]], values: list[list[Fraction]]) -> list[list[Fraction]] | None:
    """The coefficients (a row for each column of the matrix); None where there are none, or more than one set."""
    width = len(matrix[0])
    rows = [[*left, *right] for left, right in zip(matrix, values, strict=True)]
    for column in range(width):
        pivot = next((i for i in range(column, len(rows)) if rows[i][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        lead = rows[column][column]
        rows[column] = [value / lead for value in rows[column]]
        for i, row in enumerate(rows):
            if i != column and row[column]:
                factor = row[column]
                rows[i] = [a - factor * b for a, b in zip(row, rows[column], strict=True)]
    if any(any(row[width:]) for row in rows[width:]):
        return None
    return [row[width:] for row in rows[:width]]
