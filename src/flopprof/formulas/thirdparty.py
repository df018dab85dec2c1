"""Matrix products of packages that are never imported here, known by name and by the schemas they register.

Liger's and TransformerEngine 2's layers register no operator: Liger's products run as aten ones, and
TransformerEngine's never reach the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flopprof.formulas.attention import sdpa
from flopprof.formulas.contractions import grouped_mm, mm
from flopprof.formulas.operand import Tensor
from flopprof.formulas.registry import Cost, formula, product


@formula("xformers::_sparse24_gemm")
def xformers_sparse24_gemm(packed: Tensor, dense: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """2:4 (m, k) packed as (m, k/2), @ (k, n): 2 m k/2 n."""
    return 2 * product(packed.shape) * dense.shape[-1]


# --- bitsandbytes, fbgemm, TransformerEngine, torchao --------------------------------------------------------------
@formula(
    "bitsandbytes::int8_linear_matmul",
    "bitsandbytes::int8_scaled_mm",
    "fbgemm::f8f8bf16",
    "fbgemm::f8f8bf16_rowwise",
    "fbgemm::f8f8bf16_tensorwise",
    "fbgemm::f8f8bf16_blockwise",
    "fbgemm::i8i8bf16",
)
def rows_by_rows(x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ (n, k)^T: 2 rows n k; counted from the operands, for the out= forms return nothing."""
    return 2 * product(x.shape) * weight.shape[0]


@formula("bitsandbytes::int8_mixed_scaled_mm", operands=(1, 2))
def int8_mixed_scaled_mm(
    x: Tensor,
    qx: Tensor,
    qw: Tensor,
    x_scale: Any,
    w_scale: Any,
    outlier_cols: Any = None,
    *_: Any,
    out: Any,
    **__: Any,
) -> int:
    """(..., k) @ (n, k)^T in int8, then the outlier columns once more in full precision: 2 rows n (k + outliers)."""
    outliers = 0 if outlier_cols is None else product(outlier_cols.shape)
    return 2 * product(qx.shape[:-1]) * qw.shape[0] * (qx.shape[-1] + outliers)


@formula("bitsandbytes::gemv_4bit", "bitsandbytes::gemm_4bit")
def matmul_4bit(x: Tensor, packed: Tensor, shape: Sequence[int], *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ a packed (n, k)^T whose shape is given: 2 rows n k."""
    return 2 * product(x.shape) * shape[0]


@formula("tex_ts::te_gemm_ts", operands=(0, 5))
def te_gemm(
    a: Tensor,
    a_scale: Any,
    a_fp8: int,
    a_type: int,
    transa: int,
    b: Tensor,
    b_scale: Any,
    b_fp8: int,
    b_type: int,
    transb: int,
    *_: Any,
    out: Any,
) -> int:
    """Column-major gemm as BLAS has it, a (m, k) if transa else (k, m), b (n, k) unless transb: 2 m n k."""
    return 2 * product(a.shape) * b.shape[1 if transb else 0]


@formula("torchao::int_matmul", "torchao::int_scaled_matmul", "torchao::mx_fp8_bf16", "torchao::swizzle_mm")
def ao_matmul(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(m, k) @ (k, n): 2 m k n."""
    return mm(a, b, out=out)


@formula("torchao::swizzle_scaled_mm")
def ao_scaled_matmul(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(m, k) @ (k, n): 2 m k n."""
    return mm(a, b, out=out)


@formula("torchao::mx_fp4_bf16")
def ao_fp4_matmul(a: Tensor, b: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    """(m, k) @ (k, n), two values a byte: 2 m k n = 4 for every byte of a and column of the result."""
    return 4 * product(a.shape) * out.shape[-1]


@formula("torchao::rowwise_scaled_linear_cutlass_s8s4", "torchao::blockwise_fp8_gemm", operands=(0, 2))
def ao_scaled_linear(x: Tensor, x_scale: Any, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ a packed (n, k)^T: 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


@formula("torchao::rowwise_scaled_linear_cutlass_s4s4", operands=(0, 2))
def ao_s4s4_linear(x: Tensor, x_scale: Any, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ (n, k)^T, both two values a byte: 2 k for every element of the result."""
    return 2 * product(out.shape) * 2 * x.shape[-1]


@formula("torchao::rowwise_scaled_linear_sparse_cutlass_f8f8", operands=(0, 2))
def ao_sparse_linear(x: Tensor, x_scale: Any, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ 2:4 (n, k)^T: half of the dense product, k for every element of the result."""
    return product(out.shape) * x.shape[-1]


@formula("torchao::quant_llm_linear", operands=(2, 3))
def ao_quant_llm_linear(exponent: int, mantissa: int, x: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(rows, k) @ a packed (n, k)^T: 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


@formula("torchao::marlin_qqq_gemm")
def ao_marlin_qqq(x: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(m, k) @ a packed (k, n): 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


@formula("torchao::marlin_24_gemm")
def ao_marlin_24(x: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(m, k) @ a packed 2:4 (k, n): half of the dense product, k for every element of the result."""
    return product(out.shape) * x.shape[-1]


@formula(*(f"torchao::_linear_8bit_act_{bits}bit_weight" for bits in range(1, 9)))
def ao_linear_8bit_act(x: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ a packed (n, k)^T: 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


@formula("torchao::fbgemm_mxfp8_grouped_mm_2d_3d", operands=(0, 2))
def ao_mxfp8_grouped_mm(a: Tensor, a_scale: Any, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(rows, k) with a weight for each group: 2 k for every element of the result."""
    return grouped_mm(a, b, out=out)


@formula("torchao::qscaled_dot_product", operands=(0, 1, 2))
def ao_qscaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    out: Any,
    **__: Any,
) -> Cost:
    """(b, h, s, d) in 8 bits: 2 b h s t (d + dv)."""
    return sdpa(q, k, v, is_causal=is_causal, out=out)
