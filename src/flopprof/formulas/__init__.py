"""What one operator call costs: shapes in, int out; no torch.

The convention, stated here once and printed everywhere: one multiply-add is 2 FLOPs, through a matrix product, a
convolution, a recurrence or an attention operator, also where the summed dimension is 1. Products are dense and bias
free: additions, scales, activations, masks and products without a sum (outer, Hadamard) are elementwise, a column of
their own. Fourier transforms and triangular systems cost the multiply-adds of butterflies and of substitution.
Convolution taps on padding count. A complex multiply-add is 8 (the engine sees the dtype and multiplies).
Sparse products count by what they store, 2:4 by half. Attention counts every pair (`full`); a Cost also holds the
figure over only the pairs that the operator's own mask lets through. Gradients count where autograd wants them, each
as its forward; what a fused backward computes again is recompute.

Which operators have a formula: those that a dispatch mode sees in one piece, and of the composites (seen whole
under inference_mode or in exported graphs) the frequent ones whose count is the same on every device: linear, matmul,
conv*, conv_transpose*, scaled_dot_product_attention, lstm, gru, rnn and the cells. The other composites and the
kernels made of torch operators (SEEN_THROUGH) are counted by what they run.
"""

from __future__ import annotations

from collections.abc import Callable

from flopprof.errors import FormulaError
from flopprof.formulas import (
    attention,
    contractions,
    convolution,
    quantized,
    ragged,
    recurrent,
    sparse,
    thirdparty,
    thirdparty_attention,
    transforms,
)
from flopprof.formulas.registry import RULES, Cost, F, LengthsUnknown, Rule, formula, generation

__all__ = [
    "MODULES",
    "RULES",
    "SEEN_THROUGH",
    "Cost",
    "LengthsUnknown",
    "Rule",
    "generation",
    "register_formula",
]

MODULES = (
    attention,
    contractions,
    convolution,
    quantized,
    ragged,
    recurrent,
    sparse,
    thirdparty,
    thirdparty_attention,
    transforms,
)

SEEN_THROUGH = frozenset(
    {
        "aten::_convolution_double_backward",
        "aten::_native_multi_head_attention",
        "aten::_transformer_encoder_layer_fwd",
        "aten::bilinear",
        "aten::cdist",
        "aten::chain_matmul",
        "aten::conv_tbc_backward",
        "aten::einsum",
        "aten::inner",
        "aten::linalg_multi_dot",
        "aten::linalg_vecdot",
        "aten::matmul_backward",
        "aten::tensordot",
    }
)
"""Operators that multiply and have no formula on purpose: the torch operators that they run are counted instead."""


def register_formula(
    name: str, *, operands: tuple[int, ...] = (0, 1), wanted: bool = False, replace: bool = False
) -> Callable[[F], F]:
    """Decorator: the function below says what one call of the operator `namespace::name` costs.

    The function gets the operator's own arguments and `out=` its result, reads shapes, and returns FLOPs (an int) or
    a Cost. The name has no overload, no `.out` and no in-place underscore: one formula counts them all.

    operands  positions of the arguments that are multiplied: they give the dtype and the parameter
    wanted    pass `wanted=` too: which inputs of the forward need a gradient (None: not known)
    replace   put it in the place of a formula that exists

    Raises FormulaError for a name of another form, or one that has a formula already.

    >>> @register_formula("mylib::scaled_matmul", operands=(0, 1))
    ... def scaled_matmul(a, b, scale, *, out):
    ...     m, k = a.shape
    ...     return 2 * m * k * b.shape[1]
    """
    namespace, separator, operator = name.partition("::")
    if not separator or not namespace.isidentifier() or not operator.isidentifier():
        raise FormulaError(f"{name!r} is no operator name: write it as 'namespace::operator', without an overload.")
    if name in RULES and not replace:
        raise FormulaError(f"{name} has a formula already: pass replace=True to put yours in its place.")
    return formula(name, operands=operands, wanted=wanted, replace=replace)
