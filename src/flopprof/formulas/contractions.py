"""Matrix products: every way torch spells `(m, k) @ (k, n)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flopprof.formulas.operand import Tensor, Wanted
from flopprof.formulas.registry import formula, product
from flopprof.formulas.sparse import any_sparse, layout_of, sparse_product


def packing(tensor: Any) -> int:
    """Values stored in one element: 2 for the packed 4-bit floats (`float4_e2m1fn_x2`), else 1."""
    return 2 if str(getattr(tensor, "dtype", "")).endswith("_x2") else 1


@formula("aten::mm", "aten::_int_mm")
def mm(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(m, k) @ (k, n): 2 m k n."""
    if any_sparse(a, b):
        return sparse_product(a, b)
    m, k = a.shape
    _k, n = b.shape
    return 2 * m * k * n


@formula("quantized::matmul")
def quantized_matmul(a: Tensor, b: Tensor, *_: Any, out: Any) -> int:
    """(..., m, k) @ (..., k, n): 2 m k n for each of the batch."""
    return 2 * product(a.shape) * b.shape[-1]


@formula("aten::addmm", "aten::_addmm_activation", "aten::_sparse_addmm", operands=(1, 2))
def addmm(addend: Any, a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """addend + (m, k) @ (k, n): 2 m k n; the addition is elementwise."""
    return mm(a, b, out=out)


@formula("aten::bmm")
def bmm(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(b, m, k) @ (b, k, n): 2 b m k n."""
    if any_sparse(a, b):
        return sparse_product(a, b)
    batch, m, k = a.shape
    *_batch, n = b.shape
    return 2 * batch * m * k * n


@formula("aten::baddbmm", "aten::addbmm", operands=(1, 2))
def baddbmm(addend: Any, a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """addend + (b, m, k) @ (b, k, n), summed over b or not: 2 b m k n."""
    return bmm(a, b, out=out)


@formula("aten::mv")
def mv(matrix: Tensor, vector: Tensor, *, out: Any, **_: Any) -> int:
    """(m, k) @ (k): 2 m k."""
    if layout_of(matrix):
        return sparse_product(matrix, vector)
    m, k = matrix.shape
    return 2 * m * k


@formula("aten::addmv", operands=(1, 2))
def addmv(addend: Any, matrix: Tensor, vector: Tensor, *, out: Any, **_: Any) -> int:
    """addend + (m, k) @ (k): 2 m k."""
    return mv(matrix, vector, out=out)


@formula("aten::dot", "aten::vdot")
def dot(a: Tensor, b: Tensor, *, out: Any, **_: Any) -> int:
    """(k) . (k): 2 k."""
    return 2 * product(a.shape)


@formula("aten::matmul", "aten::linalg_matmul")
def matmul(a: Tensor, b: Tensor, *, out: Any, **_: Any) -> int:
    """(..., m, k) @ (..., k, n), batches broadcast, vectors allowed: 2 k for every element of the result."""
    if any_sparse(a, b):
        return sparse_product(a, b)
    return 2 * product(out.shape) * a.shape[-1]


@formula("aten::linear", "aten::mkldnn_linear", "mkldnn::_linear_pointwise")
def linear(x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ (n, k)^T: 2 k for every element of the result; the bias is elementwise."""
    if layout_of(weight):
        return sparse_product(x, weight)
    return 2 * product(out.shape) * x.shape[-1]


@formula("mkl::_mkl_linear", operands=(0, 2))
def mkl_linear(x: Tensor, packed: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ (n, k)^T: 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


@formula("aten::linear_backward", "aten::mkldnn_linear_backward", operands=(0, 1, 2))
def linear_backward(x: Tensor, grad: Tensor, weight: Tensor, output_mask: Any, *, out: Any) -> int:
    """Input gradient (n) -> (k) and weight gradient (n, k), each as the forward: 2 rows n k."""
    return 2 * product(grad.shape) * x.shape[-1] * sum(map(bool, output_mask[:2]))


@formula("aten::mkldnn_linear_backward_input", operands=(1, 2))
def mkldnn_linear_backward_input(input_size: Any, grad: Tensor, weight: Tensor, *, out: Any) -> int:
    """(rows, n) @ (n, k): 2 rows n k."""
    return 2 * product(grad.shape) * weight.shape[-1]


@formula("aten::mkldnn_linear_backward_weights")
def mkldnn_linear_backward_weights(grad: Tensor, x: Tensor, weight: Tensor, *_: Any, out: Any) -> int:
    """(rows, n)^T @ (rows, k): 2 rows n k."""
    return 2 * product(grad.shape) * x.shape[-1]


@formula("aten::_foreach_mm")
def foreach_mm(left: Sequence[Tensor], right: Sequence[Tensor], *, out: Any, **_: Any) -> int:
    """The products of two lists, pair by pair: the sum of 2 m k n."""
    return sum(mm(a, b, out=None) for a, b in zip(left, right, strict=True))


@formula("inductor::_mm_plus_mm", operands=(0, 1, 2, 3))
def mm_plus_mm(a: Tensor, b: Tensor, c: Tensor, d: Tensor, *_: Any, out: Any) -> int:
    """a @ b + c @ d: the two products."""
    return mm(a, b, out=None) + mm(c, d, out=None)


@formula("aten::_scaled_mm", "aten::_scaled_mm_v2")
def scaled_mm(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(m, k) @ (k, n) of scaled 8-bit or 4-bit floats: 2 m k n; the scales are elementwise."""
    m, k = a.shape
    return 2 * m * k * packing(a) * b.shape[-1]


@formula("aten::_scaled_addmm", operands=(1, 2))
def scaled_addmm(addend: Any, a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """addend + scaled (m, k) @ (k, n): 2 m k n."""
    return scaled_mm(a, b, out=out)


@formula(
    "aten::_grouped_mm",
    "aten::_scaled_grouped_mm",
    "aten::_scaled_grouped_mm_v2",
    "transformers::grouped_mm_fallback",
    "flopprof::quantised_grouped_mm",
)
def grouped_mm(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """One product per group. Groups split the rows, the columns or the summed dimension and add none.

    2d-3d (rows, k) @ (g, k, n): 2 rows k n. 3d-2d (g, m, k) @ (k, columns): 2 m k columns.
    3d-3d (g, m, k) @ (g, k, n): 2 g m k n. 2d-2d (m, k) @ (k, n), groups along k: 2 m k n.
    """
    k = a.shape[-1] * packing(a)
    if len(a.shape) == 2 and len(b.shape) == 2:
        return 2 * a.shape[0] * k * b.shape[-1]
    return 2 * product(out.shape) * k


@formula("transformers::grouped_mm_fallback_backward", operands=(0, 1, 3), wanted=True)
def grouped_mm_backward(a: Tensor, b: Tensor, offsets: Any, grad: Tensor, *, out: Any, wanted: Wanted = None) -> int:
    """Gradients of (rows, k) @ (g, k, n): 2 rows k n for each that is wanted."""
    edges = wanted[:2] if wanted else (True, True)
    return 2 * product(grad.shape) * a.shape[-1] * sum(edges)


@formula("aten::_trilinear", operands=(0, 1, 2))
def trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Any,
    expand2: Any,
    expand3: Any,
    sumdim: Any,
    unroll_dim: int = 1,
    *,
    out: Any,
) -> int:
    """nn.Bilinear: i1 times i2 summed over what i3 lacks, then times i3 summed over the rest.

    Each of the two is a matrix product, 2 per multiply-add, unless it sums over nothing: then it is elementwise.
    bilinear (b, i), (o, i, j), (b, j): 2 b o i j + 2 b o j; each of its gradients: 2 b o i j.
    """
    rank = len(i1.shape) + len(expand1)
    sizes = [1] * rank
    for tensor, expand in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for dim, size in zip((d for d in range(rank) if d not in expand), tensor.shape, strict=True):
            sizes[dim] = size
    summed_first = {d for d in sumdim if d in expand3 and d != unroll_dim}
    summed_second = {d for d in sumdim if d not in expand3 and d != unroll_dim}
    pair = [d for d in range(rank) if d not in expand1 or d not in expand2 or d == unroll_dim]
    first = 2 * product(sizes[d] for d in pair) if summed_first else 0
    second = 2 * product(sizes[d] for d in range(rank) if d not in summed_first) if summed_second else 0
    return first + second


@formula("aten::_euclidean_dist")
def euclidean_dist(x1: Tensor, x2: Tensor, *, out: Any) -> int:
    """cdist by matrix product, [-2 x1, |x1|^2, 1] @ [x2, 1, |x2|^2]^T over d + 2: 2 b p r (d + 2)."""
    return 2 * product(out.shape) * (x1.shape[-1] + 2)


@formula("symm_mem::fused_all_gather_matmul", "symm_mem::fused_all_gather_scaled_matmul")
def all_gather_matmul(a: Tensor, bs: Sequence[Tensor], *_: Any, out: Any, **__: Any) -> int:
    """all_gather(a) @ each b: 2 k for every element of every result."""
    return sum(2 * product(result.shape) * a.shape[-1] for result in out[1])


@formula("symm_mem::fused_matmul_reduce_scatter", "symm_mem::fused_scaled_matmul_reduce_scatter")
def matmul_reduce_scatter(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """a (..., k) @ (k, n), then scattered: 2 rows k n."""
    return 2 * product(a.shape) * b.shape[-1]
