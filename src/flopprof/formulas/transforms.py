"""Fourier transforms and triangular systems, by the multiply-adds of the algorithm that everybody runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flopprof.formulas.operand import Tensor
from flopprof.formulas.registry import formula, product


def butterflies(shape: Sequence[int], dims: Sequence[int]) -> int:
    """2 for each radix-2 butterfly of the transforms along these dimensions: N / 2 ⌈log2 N⌉ in one of length N.

    Cooley and Tukey, 1965. A length that is no power of two has as many stages as the next one.
    """
    return sum(product(shape) * (shape[dim] - 1).bit_length() for dim in dims)


@formula("aten::_fft_c2c", operands=(0,))
def fft_c2c(x: Tensor, dims: Sequence[int], *_: Any, out: Any, **__: Any) -> int:
    """One complex multiply-add (8) a butterfly: 4 N ⌈log2 N⌉ a transform of length N."""
    return butterflies(x.shape, dims)


@formula("aten::_fft_r2c", operands=(0,))
def fft_r2c(x: Tensor, dims: Sequence[int], *_: Any, out: Any, **__: Any) -> int:
    """Half of the complex transform along the last dimension; whole ones of the half that is left along the others."""
    return 4 * _halved(x.shape, dims)


@formula("aten::_fft_c2r", operands=(0,))
def fft_c2r(x: Tensor, dims: Sequence[int], normalization: Any, length: int, *_: Any, out: Any, **__: Any) -> int:
    """As the transform of its real result."""
    last = dims[-1] % len(x.shape)
    return _halved([length if dim == last else size for dim, size in enumerate(x.shape)], dims)


def _halved(shape: Sequence[int], dims: Sequence[int]) -> int:
    *others, last = dims
    left = [size // 2 + 1 if dim == last % len(shape) else size for dim, size in enumerate(shape)]
    return butterflies(shape, [last]) // 2 + butterflies(left, others)


@formula("prims::fft_c2c", operands=(0,))
def prims_c2c(x: Tensor, *, dim: Sequence[int], out: Any, **_: Any) -> int:
    """As aten::_fft_c2c."""
    return fft_c2c(x, dim, out=out)


@formula("prims::fft_r2c", operands=(0,))
def prims_r2c(x: Tensor, *, dim: Sequence[int], out: Any, **_: Any) -> int:
    """As aten::_fft_r2c."""
    return fft_r2c(x, dim, out=out)


@formula("prims::fft_c2r", operands=(0,))
def prims_c2r(x: Tensor, *, dim: Sequence[int], last_dim_size: int, out: Any, **_: Any) -> int:
    """As aten::_fft_c2r."""
    return fft_c2r(x, dim, 0, last_dim_size, out=out)


@formula("aten::linalg_solve_triangular")
def linalg_solve_triangular(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """A X = B of n unknowns and k right sides, by substitution: n (n - 1) / 2 multiply-adds each, so n (n - 1) k."""
    solution = out if hasattr(out, "shape") else out[0]
    n = a.shape[-1]
    return product(solution.shape) * (n - 1)


@formula("aten::triangular_solve")
def triangular_solve(b: Tensor, a: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """The same, with its arguments the other way round."""
    return linalg_solve_triangular(a, b, out=out)
