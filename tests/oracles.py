"""Counts that share nothing with the formulas: loop nests that add one for each multiplication and each addition.

Sizes must be tiny. A sum of n products is n multiplications and, into an accumulator, n additions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence


class Machine:
    """Multiplies and adds, and counts both."""

    def __init__(self) -> None:
        self.multiplications = 0
        self.additions = 0

    def multiply_add(self, total: float, a: float, b: float) -> float:
        """total + a * b."""
        self.multiplications += 1
        self.additions += 1
        return total + a * b

    @property
    def flops(self) -> int:
        return self.multiplications + self.additions


Matrix = list[list[float]]


def ones(rows: int, columns: int) -> Matrix:
    return [[1.0] * columns for _ in range(rows)]


def matmul(machine: Machine, a: Matrix, b: Matrix) -> Matrix:
    """a @ b, one multiply-add at a time."""
    result = ones(len(a), len(b[0]))
    for i, row in enumerate(a):
        for j in range(len(b[0])):
            total = 0.0
            for k, value in enumerate(row):
                total = machine.multiply_add(total, value, b[k][j])
            result[i][j] = total
    return result


def counted(work: Callable[[Machine], object]) -> int:
    machine = Machine()
    work(machine)
    return machine.flops


def mm_flops(m: int, k: int, n: int) -> int:
    return counted(lambda machine: matmul(machine, ones(m, k), ones(k, n)))


def bmm_flops(batch: int, m: int, k: int, n: int) -> int:
    return sum(mm_flops(m, k, n) for _ in range(batch))


def positions(sizes: Iterable[int]) -> Iterable[tuple[int, ...]]:
    """Every index of an array of these sizes."""
    return itertools.product(*(range(size) for size in sizes))


def conv_flops(
    x: Sequence[int],
    weight: Sequence[int],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> int:
    """(b, c, *sizes), weight (n, c/groups, *kernel): slides the kernel over the padded input, any rank."""
    machine = Machine()
    batch, channels, *sizes = x
    filters, group_channels, *kernel = weight
    assert channels == group_channels * groups
    padded = [size + 2 * padding for size in sizes]
    starts = [range(0, p - dilation * (k - 1), stride) for p, k in zip(padded, kernel, strict=True)]
    for _ in positions((batch, filters)):
        for _start in itertools.product(*starts):
            for _tap in positions((group_channels, *kernel)):
                machine.multiply_add(0.0, 1.0, 1.0)
    return machine.flops


def conv_transpose_flops(x: Sequence[int], weight: Sequence[int], *, groups: int = 1) -> int:
    """(b, c, *sizes), weight (c, n/groups, *kernel): scatters each input element through its group's kernels."""
    machine = Machine()
    batch, channels, *sizes = x
    weight_channels, group_filters, *kernel = weight
    assert channels == weight_channels
    assert channels % groups == 0
    for _element in positions((batch, channels, *sizes)):
        for _tap in positions((group_filters, *kernel)):
            machine.multiply_add(0.0, 1.0, 1.0)
    return machine.flops


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], sees: Callable[[int, int], bool]) -> int:
    """Scores and values of (b, h, s, d), (b, hk, t, d), (b, hk, t, dv), for the pairs that `sees` lets through."""
    machine = Machine()
    batch, heads, queries, d = q
    keys, dv = v[2:]
    assert heads % k[1] == 0
    for _head in positions((batch, heads)):
        for i, j in positions((queries, keys)):
            if sees(i, j):
                for _ in range(d + dv):
                    machine.multiply_add(0.0, 1.0, 1.0)
    return machine.flops


def attention_backward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], wanted: Sequence[bool]) -> int:
    """The products that the chain rule needs of (scores = Q K^T, P, out = P V): dV, then dP, then dQ and dK."""
    batch, heads, s, d = q
    t, dv = v[2:]
    for_q, for_k, for_v = wanted
    products = []
    if for_v:
        products.append((t, s, dv))  # P^T @ dO
    if for_q or for_k:
        products.append((s, dv, t))  # dO @ V^T
    if for_q:
        products.append((s, t, d))  # dS @ K
    if for_k:
        products.append((t, s, d))  # dS^T @ Q
    return batch * heads * sum(mm_flops(*sizes) for sizes in products)


def rnn_flops(
    lengths: Sequence[int],
    inputs: int,
    hidden: int,
    gates: int,
    *,
    layers: int = 1,
    directions: int = 1,
    projection: int = 0,
) -> int:
    """Steps through every sequence: gates from the input and the state, and the projected state if there is one."""
    machine = Machine()
    state = projection or hidden
    for layer in range(layers):
        features = inputs if layer == 0 else state * directions
        for _direction in range(directions):
            for length in lengths:
                for _step in range(length):
                    matmul(machine, ones(gates * hidden, features), ones(features, 1))
                    matmul(machine, ones(gates * hidden, state), ones(state, 1))
                    if projection:
                        matmul(machine, ones(projection, hidden), ones(hidden, 1))
    return machine.flops


def sparse_mm_flops(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> int:
    """a @ b, skipping every pair where either is zero."""
    machine = Machine()
    for row in a:
        for k, value in enumerate(row):
            for other in b[k]:
                if value != 0 and other != 0:
                    machine.multiply_add(0.0, value, other)
    return machine.flops


def einsum_flops(equation: str, *shapes: Sequence[int]) -> int:
    """2 for every point of the index space of a pairwise einsum; 0 where nothing is summed (elementwise)."""
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            if sizes.setdefault(index, size) != size:
                raise ValueError(f"index {index} is {sizes[index]} and {size} in {equation}")
    if set(sizes) == set(output):
        return 0
    total = 2
    for size in sizes.values():
        total *= size
    return total
