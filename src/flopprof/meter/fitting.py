"""Polynomials through counts at whatever sizes a loop happened to have: exact, and proved by the counts themselves.

Counts of a training loop lie on no grid, so the coefficients are solved for exactly. A form is taken only where each
count is told by all of the others, and used between the sizes that were counted (in their hull; between those of each
kind, where it is linear and many prove it), on the lattice that they span (a form of even lengths says nothing of odd
ones). Sizes that the form does not look at must not matter, as far as the counts can tell: batches of 8 x 64 and
4 x 128 tokens say nothing of 8 x 128.

Where several sizes vary, counts that differ in few of them are looked at first: a smaller last batch must not spoil
what is known of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations, product
from operator import add, mul

Sizes = tuple[int, ...]  # below 0: -1 - the nodes that autograd made, a result as the counts are
Name = tuple[str, str]
Counts = Mapping[Name, int]
Row = list[int]
_MOST_SYMBOLS = 3
_HIGHEST = 3
# To so many of the latest counts a form is fitted; where these have none, it is not tried again each time.
_MOST_SAMPLES = 32
# What made no difference in so many counts is taken to make none a little beyond them, too.
_SETTLED = 16
# Of more sizes (how many boxes each image has), the products of those that make no difference are not looked at.
_MOST_PRODUCTS = 4
# Of more, counts that differ in few of them are not looked for.
_MOST_ALONE = 6
_NODES = "nodes"
_AMONG_SIZES: tuple[Sizes, ...] = ((),)  # names a pool as no sizes and no nodes do


class Forms:
    """What the counts of one place in the tree of a step's events say of other sizes there."""

    def __init__(self) -> None:
        self._samples: dict[Sizes, dict[Name, int]] = {}
        self._tried: dict[tuple[Sizes, ...], tuple[int, Fit | None]] = {}

    def add(self, sizes: Sizes, counts: Counts) -> None:
        """A count is true there; what was held true there before is not."""
        told = {(_NODES, str(i)): -1 - size for i, size in enumerate(sizes) if size < 0}
        told |= counts
        if self._samples.get(sizes, told) != told:
            self._tried.clear()
        self._samples[sizes] = told

    def at(self, sizes: Sizes) -> dict[Name, int] | None:
        """The counts at these sizes; None where no form is proved that tells them.

        They may lack the last one, nodes that were not made yet: then what they would be with some number of nodes.
        """
        for key, pool in self._pools(sizes):
            values = self._told(key, pool, sizes)
            if values is not None:
                return values
        points = [*self._samples]
        if len({_nodes_of(point) for point in points}) > 1:
            short = len(sizes) < len(points[0])
            for whole in {(*sizes, point[-1]) for point in points} if short else (sizes,):
                values = self._told(_AMONG_SIZES, points, whole)
                if values is not None:
                    return values
        return None

    def _told(self, key: tuple[Sizes, ...], pool: Sequence[Sizes], sizes: Sizes) -> dict[Name, int] | None:
        """What a form through these counts tells; _AMONG_SIZES: with the nodes among the sizes."""
        fit = self._fit(key, pool)
        if fit is None:
            return None
        return fit.at(_with_nodes(sizes) if key == _AMONG_SIZES else sizes)

    def _pools(self, sizes: Sizes) -> Iterator[tuple[tuple[Sizes, ...], list[Sizes]]]:
        """Counts that may tell of these sizes, and what names them: those that differ in one size alone come first."""
        points = [*self._samples]
        if len(points) < 2:
            return
        varying = [column for column in _columns(points) if not column.constant]
        few = [*range(1, len(varying))]
        if len(varying) > _MOST_SYMBOLS:
            few = [1, len(varying) - 1] if len(varying) <= _MOST_ALONE else []
        for chosen in (chosen for count in few for chosen in combinations(varying, count)):
            free = {i for column in chosen for i in column.offsets}
            alike = [i for i, size in enumerate(sizes) if size >= 0 and i not in free]
            pool = [point for point in points if all(point[i] == sizes[i] for i in alike)]
            yield from _by_nodes((tuple(column.first for column in chosen), tuple(sizes[i] for i in alike)), pool)
        yield from _by_nodes((), points)

    def _fit(self, key: tuple[Sizes, ...], pool: Sequence[Sizes]) -> Fit | None:
        count = len(pool)
        tried, fit = self._tried.get(key, (0, None))
        if tried != count and count > 1 and not (fit is None and count > _MOST_SAMPLES and count & (count - 1)):
            latest = {point: self._samples[point] for point in pool[-_MOST_SAMPLES:]}
            if key == _AMONG_SIZES:
                latest = {_with_nodes(point): _without_nodes(counts) for point, counts in latest.items()}
            fit = fitted(latest)
            self._tried[key] = count, fit
        return fit


def are_one(samples: Mapping[Sizes, Counts]) -> bool:
    """Is there one proved form through the latest of these counts?"""
    forms = Forms()
    for sizes, counts in samples.items():
        forms.add(sizes, counts)
    return forms._fit((), [*samples]) is not None


def _nodes_of(sizes: Sizes) -> Sizes:
    return tuple(size for size in sizes if size < 0)


def _with_nodes(sizes: Sizes) -> Sizes:
    return tuple(-1 - size if size < 0 else size for size in sizes)


def _without_nodes(counts: Counts) -> dict[Name, int]:
    return {name: count for name, count in counts.items() if name[0] != _NODES}


def _by_nodes(key: tuple[Sizes, ...], pool: list[Sizes]) -> Iterator[tuple[tuple[Sizes, ...], list[Sizes]]]:
    """All of them, then those that made the same nodes: of a model that is checkpointed now and then, say."""
    yield key, pool
    kinds: dict[Sizes, list[Sizes]] = {}
    for point in pool:
        kinds.setdefault(_nodes_of(point), []).append(point)
    if len(kinds) > 1:
        yield from (((*key, nodes), alike) for nodes, alike in kinds.items())


class Fit:
    """A proved form: integers as polynomials in some of the sizes."""

    def __init__(
        self,
        columns: Sequence[Column],
        used: Sequence[int],
        basis: Sequence[Sizes],
        table: dict[Name, Row],
        divisor: int,
        points: Sequence[Sizes],
    ) -> None:
        looked_at = [i for i in range(len(used)) if any(powers[i] for powers in basis)]
        self._columns, self._used = columns, [used[i] for i in looked_at]
        self._basis = [tuple(powers[i] for i in looked_at) for powers in basis]
        self._table, self._divisor = table, divisor
        self._linear = len(points) >= _MOST_SAMPLES and all(sum(powers) < 2 for powers in basis)
        self._varying = [column.first for column in columns if not column.constant]
        self._idle: set[int] = set()
        if len(points) > _SETTLED:
            self._idle = set(self._varying) - {columns[i].first for i in self._used}
        # What the counts tell apart of the varying sizes and their products.
        self._known = _Span([self._described(point) for point in points]) if len(self._varying) > 1 else None
        self._hulls = {
            pair: _hull({(p[pair[0]], p[pair[1]]) for p in points})
            for pair in combinations([i for i in self._varying if i not in self._idle], 2)
        }

    def at(self, sizes: Sizes) -> dict[Name, int] | None:
        """Its values at these sizes, which may lack the last ones; None where it is not proved."""
        if not all(column.covers(sizes, beyond=column.first in self._idle) for column in self._columns):
            return None
        if not self._linear and not all(_within((sizes[i], sizes[j]), hull) for (i, j), hull in self._hulls.items()):
            return None
        if self._known is not None and not self._known.holds(self._described(sizes)):
            return None
        terms = self._terms(sizes)
        values: dict[Name, int] = {}
        for name, coefficients in self._table.items():
            value, rest = divmod(sum(map(mul, coefficients, terms)), self._divisor)
            if rest or value < 0:
                return None
            if name[0] != _NODES:
                values[name] = value
            elif int(name[1]) < len(sizes) and sizes[int(name[1])] != -1 - value:
                return None
        return values

    def _terms(self, sizes: Sizes) -> Row:
        return _terms([sizes[self._columns[i].first] for i in self._used], self._basis)

    def _described(self, sizes: Sizes) -> Row:
        varying = [sizes[i] for i in self._varying]
        few = varying if len(varying) <= _MOST_PRODUCTS else [sizes[i] for i in self._varying if i not in self._idle]
        return [1, *varying, *(a * b for a, b in combinations(few, 2)), *self._terms(sizes)]


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

    def covers(self, sizes: Sizes, *, beyond: bool) -> bool:
        """Do these sizes go together so, between those that were counted and on their lattice?

        beyond: or no further from these than they are from each other.
        """
        value = sizes[self.first]
        more = self.high - self.low if beyond else 0
        if not self.low - more <= value <= self.high + more or (self.step and (value - self.start) % self.step):
            return False
        return all(sizes[i] - value == offset for i, offset in self.offsets.items())


def _hull(points: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The corners of the convex hull, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted(points)
    corners: list[tuple[int, int]] = []
    for chain in (ordered, ordered[::-1]):
        start = len(corners)
        for point in chain:
            while len(corners) > start + 1 and _turn(corners[-2], corners[-1], point) <= 0:
                corners.pop()
            corners.append(point)
        corners.pop()
    return corners


def _within(point: tuple[int, int], corners: list[tuple[int, int]]) -> bool:
    """Is it inside or on the edge? (On the line of a hull of two corners.)"""
    return all(_turn(corners[i - 1], corners[i], point) >= 0 for i in range(len(corners)))


def _turn(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def fitted(samples: Mapping[Sizes, Counts]) -> Fit | None:
    """The simplest form through all of these counts that tells each of them by the others; None where there is none."""
    points = list(samples)
    columns = _columns(points)
    varying = [i for i, column in enumerate(columns) if not column.constant]
    names = list(dict.fromkeys(name for values in samples.values() for name in values))
    rows = [[samples[point].get(name, 0) for name in names] for point in points]
    for used, basis in _candidates(varying):
        if len(basis) >= len(points):
            continue
        matrix = [_terms([point[columns[i].first] for i in used], basis) for point in points]
        solution = _solved(matrix, rows)
        if solution is not None and all(_Span(matrix).told):
            coefficients, divisor = solution
            terms = [i for i, line in enumerate(coefficients) if any(line)]
            table = {name: [coefficients[i][column] for i in terms] for column, name in enumerate(names)}
            return Fit(columns, used, [basis[i] for i in terms], table, divisor, points)
    return None


def _terms(place: Sequence[int], basis: Sequence[Sizes]) -> Row:
    return [math.prod(map(pow, place, powers)) for powers in basis]


def _columns(points: Sequence[Sizes]) -> list[Column]:
    columns: list[Column] = []
    values = [list(column) for column in zip(*points, strict=True)]
    for i, column in enumerate(values):
        if column[0] < 0:
            continue
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
    for count in range(1, _symbols(len(varying)) + 1):
        for used in combinations(varying, count):
            found += [(used, basis) for basis in _bases(count)]
    plain = [(0,) * len(varying), *_units(len(varying))]
    found.append((tuple(varying), plain))
    if _MOST_SYMBOLS < len(varying) <= _MOST_ALONE:  # linear, and what each is times one of them: a batch, or calls
        for lead in _units(len(varying)):
            found.append(
                (tuple(varying), [*plain, *(tuple(map(add, lead, unit)) for unit in plain[1:] if unit != lead)])
            )
    yield from sorted(found, key=lambda item: (len(item[1]), len(item[0])))


def _symbols(varying: int) -> int:
    """In so many sizes a form is looked for, of those that vary: ever fewer, that it takes no time to find none."""
    return _MOST_SYMBOLS if varying <= 4 else 2 if varying <= 6 else 1


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
            basis = [tuple(powers[order.index(i)] for i in range(count)) for powers in basis]
            yield basis
            if batch == (1,):
                yield [(0,) * count, *basis]  # bytes of the weights, say
    yield list(product(range(2), repeat=count))


def _solved(matrix: Sequence[Row], values: Sequence[Row]) -> tuple[list[Row], int] | None:
    """The coefficients (a row for each column of the matrix) times an integer, and that integer.

    None where there are none, or more than one set.
    """
    width = len(matrix[0])
    rows = [[*left, *right] for left, right in zip(matrix, values, strict=True)]
    rank, pivot = _eliminate(rows, width)
    if rank < width or any(any(row[width:]) for row in rows[width:]):
        return None
    return [row[width:] for row in rows[:width]], pivot


class _Span:
    """What rows span, and which of them (`told`) the others span without it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._width = len(rows[0])
        whole = [[*row, *(int(i == j) for j in range(len(rows)))] for i, row in enumerate(rows)]
        rank, _ = _eliminate(whole, self._width)
        self._rows = whole[:rank]
        self.told = [any(row[self._width + i] for row in whole[rank:]) for i in range(len(rows))]

    def holds(self, row: Row) -> bool:
        """Is this one a sum of them, and would be without any one of them?"""
        rest = [*row, *(0 for _ in self.told)]
        for known in self._rows:
            lead = next(i for i, value in enumerate(known) if value)
            if rest[lead]:
                factor, pivot = rest[lead], known[lead]
                rest = [a * pivot - b * factor for a, b in zip(rest, known, strict=True)]
        parts = zip(rest[self._width :], self.told, strict=True)
        return not any(rest[: self._width]) and all(told or not share for share, told in parts)


def _eliminate(rows: list[Row], width: int) -> tuple[int, int]:
    """Gauss, Jordan and Bareiss in the first columns, in place: the rank, and what the pivots are.

    The rows that lead are the first ones. Every division is exact.
    """
    rank, before = 0, 1
    for column in range(width):
        lead = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if lead is None:
            continue
        rows[rank], rows[lead] = rows[lead], rows[rank]
        known = rows[rank]
        pivot = known[column]
        for i, row in enumerate(rows):
            if i != rank:
                factor = row[column]
                rows[i] = [(a * pivot - b * factor) // before for a, b in zip(row, known, strict=True)]
        before = pivot
        rank += 1
    return rank, before
