"""Sparse products: 2 FLOPs for each stored element and each column (or row) that it meets.

Stored means stored: an explicit zero of a COO or CSR tensor, and every element of a stored block of BSR or BSC,
is multiplied by the kernels and counted. 2:4 semi-structured operands store half of their elements.
"""

from __future__ import annotations

from typing import Any

from flopprof.formulas.operand import Tensor
from flopprof.formulas.registry import LengthsUnknown, formula, product

# Layout objects are singletons, so a dict lookup tells dense from sparse without importing torch.
_KINDS: dict[Any, str] = {}
_ON_META = "a sparse tensor on the meta device does not know its non-zeros"


def layout_of(tensor: Any) -> str:
    """`""` for a dense tensor, else the sparse layout: coo, csr, csc, bsr, bsc."""
    layout = getattr(tensor, "layout", None)
    kind = _KINDS.get(layout)
    if kind is None:
        prefix, _, name = str(layout).partition("sparse_")
        kind = _KINDS[layout] = name if prefix == "torch." else ""
    return kind


def any_sparse(a: Any, b: Any) -> bool:
    """Is one of the two sparse? Asked for every matrix product, where both are usually of one known layout."""
    layout = getattr(a, "layout", None)
    return bool(layout is not getattr(b, "layout", None) or _KINDS.get(layout) != "") and bool(
        layout_of(a) or layout_of(b)
    )


def stored_elements(tensor: Any) -> int:
    """Elements that a sparse tensor stores; blocks count whole."""
    if str(tensor.device) == "meta":
        raise LengthsUnknown(_ON_META)
    if layout_of(tensor) == "coo":
        return int(tensor._nnz())
    return product(tensor.values().shape)


def _per_index(tensor: Any, dim: int, size: int) -> Any:
    """Stored elements per row (dim 0) or per column (dim 1) of a sparse matrix: an integer tensor of length `size`."""
    kind = layout_of(tensor)
    if kind == "coo":
        return tensor._indices()[dim].bincount(minlength=size)
    if kind not in ("csr", "csc"):
        raise LengthsUnknown(f"the multiply-adds that meet in a product of two sparse_{kind} tensors are not known")
    if (kind == "csr") == (dim == 0):
        pointers = tensor.crow_indices() if kind == "csr" else tensor.ccol_indices()
        return pointers[1:] - pointers[:-1]
    indices = tensor.col_indices() if kind == "csr" else tensor.row_indices()
    return indices.bincount(minlength=size)


def sparse_product(a: Any, b: Any) -> int:
    """a @ b where one or both are sparse: 2 per pair of a stored element and the elements that it meets."""
    if not layout_of(b):
        batch = product(b.shape[:-2]) if len(a.shape) == 2 else 1
        return 2 * stored_elements(a) * batch * (b.shape[-1] if len(b.shape) > 1 else 1)
    if not layout_of(a):
        return 2 * stored_elements(b) * (product(a.shape[:-1]) if len(b.shape) == 2 else a.shape[-2])
    if "meta" in {str(a.device), str(b.device)}:
        raise LengthsUnknown(_ON_META)
    inner = a.shape[-1]
    return 2 * int((_per_index(a, 1, inner) * _per_index(b, 0, inner)).sum().item())


@formula("aten::_sparse_mm", "aten::smm", "aten::hspmm", "aten::_sparse_mm_reduce_impl", "aten::_sparse_sparse_matmul")
def sparse_mm(sparse: Tensor, dense: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """sparse (m, k) @ (k, n): 2 nnz n; of two sparse ones, 2 for each pair that meets."""
    return sparse_product(sparse, dense)


@formula("aten::sspaddmm", operands=(1, 2))
def sspaddmm(addend: Any, sparse: Tensor, dense: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """addend + sparse (m, k) @ (k, n): 2 nnz n."""
    return sparse_product(sparse, dense)


@formula("aten::_sparse_mm_reduce_impl_backward", operands=(0, 1, 2))
def sparse_mm_reduce_backward(
    sparse: Tensor, grad: Tensor, dense: Tensor, reduce: str, arg_out: Any, output_mask: Any, *, out: Any
) -> int:
    """Each wanted gradient meets every stored element once per column, as the forward: 2 nnz n each."""
    return 2 * stored_elements(sparse) * grad.shape[-1] * sum(map(bool, output_mask))


@formula("aten::sparse_sampled_addmm", operands=(1, 2))
def sampled_addmm(sampled: Tensor, a: Tensor, b: Tensor, *, out: Any, **_: Any) -> int:
    """(m, k) @ (k, n) only where `sampled` stores an element: 2 nnz k."""
    return 2 * stored_elements(sampled) * a.shape[-1]


@formula("aten::_sparse_semi_structured_mm", operands=(0, 2))
def semi_structured_mm(packed: Tensor, meta: Any, dense: Tensor, *, out: Any, **_: Any) -> int:
    """2:4 (m, k) packed as (m, k/2), @ (k, n): 2 m k/2 n."""
    return 2 * product(packed.shape) * dense.shape[-1]


@formula("aten::_sparse_semi_structured_addmm", operands=(1, 3))
def semi_structured_addmm(addend: Any, packed: Tensor, meta: Any, dense: Tensor, *, out: Any, **_: Any) -> int:
    """addend + 2:4 (m, k) packed as (m, k/2), @ (k, n): 2 m k/2 n."""
    return 2 * product(packed.shape) * dense.shape[-1]


@formula("aten::_sparse_semi_structured_linear")
def semi_structured_linear(x: Tensor, packed: Tensor, meta: Any, *, out: Any, **_: Any) -> int:
    """(..., k) @ 2:4 (n, k)^T packed as (n, k/2): 2 rows n k/2."""
    return 2 * product(x.shape[:-1]) * product(packed.shape)


@formula("aten::_cslt_sparse_mm")
def cslt_sparse_mm(compressed: Any, dense: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """2:4 (m, k) @ (k, n), half of the dense product: 2 m n k/2; the compressed operand tells no shape."""
    return product(out.shape) * dense.shape[0]
