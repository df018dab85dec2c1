"""Fourier transforms and triangular systems against programs that do them one multiply-add at a time."""

from __future__ import annotations

import cmath

import pytest
import torch

from flopprof import FlopCounter, count


def fft(values: list[complex]) -> tuple[list[complex], int]:
    """(the transform, complex multiply-adds) by Cooley and Tukey; the length is a power of two."""
    if len(values) == 1:
        return values, 0
    (even, first), (odd, second) = fft(values[::2]), fft(values[1::2])
    half, spent = len(even), first + second
    found = [0j] * len(values)
    for k in range(half):
        twisted = cmath.exp(-2j * cmath.pi * k / len(values)) * odd[k]
        found[k], found[k + half] = even[k] + twisted, even[k] - twisted
        spent += 1
    return found, spent


@pytest.mark.parametrize("length", [1, 2, 4, 8, 32])
def test_a_complex_transform_costs_its_butterflies(length: int) -> None:
    x = torch.randn(3, length, dtype=torch.complex128)
    found, spent = fft(x[0].tolist())
    assert torch.allclose(torch.tensor(found, dtype=x.dtype), torch.fft.fft(x[0]))
    assert count(torch.fft.fft, x).forward_flops == 3 * 8 * spent
    assert count(torch.fft.ifft, x).forward_flops == 3 * 8 * spent


def test_transforms_of_several_dimensions_are_those_of_each() -> None:
    x = torch.randn(8, 16, dtype=torch.complex64)
    each = count(lambda: torch.fft.fft(torch.fft.fft(x, dim=0), dim=1)).forward_flops
    assert count(torch.fft.fft2, x).forward_flops == each > 0


@pytest.mark.parametrize("length", [4, 8, 16])
def test_a_real_transform_is_half_of_a_complex_one(length: int) -> None:
    real = torch.randn(2, length)
    there = count(torch.fft.rfft, real).forward_flops
    assert 2 * there == count(torch.fft.fft, real + 0j).forward_flops
    assert count(lambda: torch.fft.irfft(torch.fft.rfft(real))).forward_flops == 2 * there


def test_the_backward_of_a_transform_is_one() -> None:
    x = torch.randn(2, 8, dtype=torch.complex64, requires_grad=True)
    with FlopCounter() as counter:
        torch.view_as_real(torch.fft.fft(x)).sum().backward()
    assert counter.profile.backward_flops == counter.profile.forward_flops > 0


def substitute(a: list[list[float]], b: list[float]) -> tuple[list[float], int]:
    """(x of the lower triangular A x = b, multiply-adds)."""
    x: list[float] = []
    spent = 0
    for row, value in zip(a, b, strict=True):
        for factor, known in zip(row, x, strict=False):
            value -= factor * known
            spent += 1
        x.append(value / row[len(x)])
    return x, spent


@pytest.mark.parametrize(("unknowns", "sides"), [(1, 1), (2, 3), (5, 2), (7, 4)])
def test_a_triangular_system_costs_its_substitution(unknowns: int, sides: int) -> None:
    a = torch.randn(unknowns, unknowns, dtype=torch.float64).tril() + 3 * torch.eye(unknowns)
    b = torch.randn(unknowns, sides, dtype=torch.float64)
    solved = [substitute(a.tolist(), column) for column in b.t().tolist()]
    expected = torch.tensor([x for x, _ in solved], dtype=a.dtype).t()
    assert torch.allclose(torch.linalg.solve_triangular(a, b, upper=False), expected)
    spent = sum(one for _, one in solved)
    assert count(lambda: torch.linalg.solve_triangular(a, b, upper=False)).forward_flops == 2 * spent
    from_right = count(lambda: torch.linalg.solve_triangular(a.t(), b.t(), upper=True, left=False))
    assert from_right.forward_flops == 2 * spent
