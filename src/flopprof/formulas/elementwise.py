"""Elementwise costs: what each addition, activation, norm, reduction costs per element. Never in `flops`.

Convention: an addition, subtraction, multiplication, division, maximum, minimum (a comparison whose result is a
number), rounding, change of sign, and one transcendental or special function (exp, log, tanh, erf, sqrt, pow,
lgamma ...) are 1 each; a composite function is the number of these in its equation. A sum of n elements is n.
Comparisons to booleans, logical and bitwise operations, selections (where, masked_fill), searches (argmax, sort),
copies and casts are free. What is once per row or channel is 0. Every dtype counts alike: a complex or integer
element is one element, a sparse tensor is its dense shape. In-place, out= and overloads fold into the base name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flopprof.formulas import accumulation, losses, normalization, pointwise, resampling


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Cost of one operator.

    cost     FLOPs per element
    per      "out": elements of the first tensor of the result; "in": of the first tensor argument; where that is
             a list of tensors, of all of them
    cost_of  where the cost depends on more: called with the operator's own arguments and `out=` its result, it
             returns the FLOPs of the call (cost and per are not used); raises LengthsUnknown where values decide
    """

    cost: int
    per: Literal["out", "in"]
    cost_of: Callable[..., int] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Operators of one cost: the equation counted, and their names (`aten::` unless they say otherwise)."""

    cost: int
    per: Literal["out", "in"]
    equation: str
    names: str


FAMILIES: tuple[Family, ...] = (
    # --- one primitive or function of the element -----------------------------------------------
    Family(
        1,
        "out",
        "a * b, a / b, -a, |a|, sign",
        """mul multiply true_divide neg negative abs absolute sign sgn copysign conj_physical _conj_physical
        quantized::add quantized::add_out quantized::add_scalar quantized::add_scalar_out quantized::mul
        quantized::mul_out quantized::mul_scalar quantized::mul_scalar_out _quantized::add onednn::qadd onednn::qmul
        prims::add prims::sub prims::mul prims::div prims::neg prims::abs prims::sign prims::conj_physical""",
    ),
    Family(
        1,
        "out",
        "max(a, b), min(a, b)",
        """maximum minimum fmax fmin clamp_max clamp_min relu threshold threshold_backward quantized::threshold
        prims::maximum prims::minimum prims::fmax prims::fmin""",
    ),
    Family(
        1,
        "out",
        "round, floor, ceil, trunc",
        """ceil floor round trunc fix special_round nextafter gcd lcm frexp heaviside prims::ceil prims::floor
        prims::round prims::trunc prims::nextafter prims::gcd prims::frexp""",
    ),
    Family(
        1,
        "out",
        "sqrt, exp, log, pow, trigonometric",
        """sqrt rsqrt reciprocal square exp exp2 expm1 special_exp2 special_expm1 log log10 log1p log2 special_log1p
        pow float_power sin cos tan asin acos atan arcsin arccos arctan atan2 arctan2 sinh cosh tanh asinh acosh
        atanh arcsinh arccosh arctanh angle deg2rad rad2deg prims::sqrt prims::rsqrt prims::cbrt prims::reciprocal
        prims::exp prims::exp2 prims::expm1 prims::log prims::log10 prims::log1p prims::log2 prims::pow prims::sin
        prims::cos prims::tan prims::asin prims::acos prims::atan prims::atan2 prims::sinh prims::cosh prims::tanh
        prims::asinh prims::acosh prims::atanh""",
    ),
    Family(
        1,
        "out",
        "one special function",
        """erf erfc erfinv special_erf special_erfc special_erfinv special_erfcx lgamma digamma polygamma
        special_gammaln special_digamma special_psi special_polygamma igamma igammac special_gammainc
        special_gammaincc i0 special_i0 special_i0e special_i1 special_i1e special_airy_ai special_bessel_j0
        special_bessel_j1 special_bessel_y0 special_bessel_y1 special_modified_bessel_i0 special_modified_bessel_i1
        special_modified_bessel_k0 special_modified_bessel_k1 special_scaled_modified_bessel_k0
        special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_ndtri special_log_ndtr special_zeta
        _standard_gamma_grad _dirichlet_grad prims::erf prims::erfc prims::erf_inv prims::erfcx prims::lgamma
        prims::digamma prims::igamma prims::igammac prims::bessel_i0 prims::bessel_i0e prims::bessel_i1
        prims::bessel_i1e prims::bessel_j0 prims::bessel_j1 prims::spherical_bessel_j0 prims::ndtri prims::zeta""",
    ),
    Family(
        1,
        "out",
        "one orthogonal polynomial",
        """special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
        special_chebyshev_polynomial_w special_hermite_polynomial_h special_hermite_polynomial_he
        special_laguerre_polynomial_l special_legendre_polynomial_p special_shifted_chebyshev_polynomial_t
        special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
        special_shifted_chebyshev_polynomial_w""",
    ),
    # --- short equations ------------------------------------------------------------------------
    Family(2, "out", "floor(a / b)", "floor_divide"),
    Family(4, "out", "a - b floor(a / b)", "remainder fmod prims::remainder prims::fmod"),
    Family(2, "out", "a - trunc(a)", "frac"),
    Family(2, "out", "a 2^b", "ldexp"),
    Family(2, "out", "finite: (a == a) (|a| != inf)", "isfinite"),
    Family(2, "out", "a log b", "xlogy special_xlogy special_xlog1py"),
    Family(3, "out", "-a log a", "special_entr"),
    Family(3, "out", "sin(pi a) / (pi a)", "sinc special_sinc"),
    Family(4, "out", "sqrt(a a + b b)", "hypot prims::hypot"),
    Family(4, "out", "r cos t, r sin t", "polar"),
    Family(3, "out", "a + w (b - a)", "lerp"),
    Family(7, "out", "max(a, b) + log1p(exp(-|a - b|))", "logaddexp logaddexp2"),
    Family(3, "out", "a1 b2 - a2 b1", "linalg_cross"),
    Family(5, "in", "|a - b| against atol + rtol |b|", "allclose"),
    Family(
        2,
        "out",
        "max(a + b, 0), max(a b, 0)",
        """quantized::add_relu quantized::add_relu_out quantized::add_scalar_relu quantized::add_scalar_relu_out
        quantized::mul_relu quantized::mul_relu_out quantized::mul_scalar_relu quantized::mul_scalar_relu_out
        onednn::qadd_relu""",
    ),
    # --- activations ----------------------------------------------------------------------------
    Family(4, "out", "sigmoid: 1 / (1 + exp(-x))", "sigmoid special_expit quantized::sigmoid"),
    Family(5, "out", "silu: x sigmoid(x)", "silu"),
    Family(4, "out", "mish: x tanh(log1p(exp x))", "mish"),
    Family(4, "out", "softplus: log1p(exp(b x)) / b", "softplus"),
    Family(6, "out", "log sigmoid: min(x, 0) - log1p(exp(-|x|))", "log_sigmoid_forward"),
    Family(
        2,
        "out",
        "leaky relu: x > 0 ? x : a x",
        """leaky_relu _prelu_kernel rrelu_with_noise rrelu_with_noise_functional quantized::leaky_relu
        quantized::prelu""",
    ),
    Family(2, "out", "min(max(x, a), b)", "hardtanh relu6 quantized::clamp quantized::relu6"),
    Family(4, "out", "hard sigmoid: min(max(x + 3, 0), 6) / 6", "hardsigmoid"),
    Family(5, "out", "hard swish: x min(max(x + 3, 0), 6) / 6", "hardswish quantized::hardswish"),
    Family(2, "out", "hard shrink: |x| > l ? x : 0", "hardshrink"),
    Family(3, "out", "soft shrink: x - min(max(x, -l), l)", "softshrink"),
    Family(5, "out", "celu: x > 0 ? x : a (exp(x / a) - 1)", "celu quantized::celu"),
    Family(4, "out", "elu: x > 0 ? x : a (exp(x) - 1)", "quantized::elu"),
    Family(5, "out", "glu: a sigmoid(b)", "glu"),
    Family(9, "out", "glu's tangent: da s + glu (1 - s) db", "glu_jvp"),
    Family(3, "out", "g y (1 - y), g (1 - y y)", "sigmoid_backward tanh_backward"),
    Family(9, "out", "silu': g s (1 + x (1 - s))", "silu_backward"),
    Family(13, "out", "mish': g (t + x s (1 - t t)), t = tanh(log1p(exp x))", "mish_backward"),
    Family(5, "out", "softplus': g z / (z + 1), z = exp(b x)", "softplus_backward"),
    Family(8, "out", "log sigmoid': g (m - s z / (1 + z)), z = exp(-|x|)", "log_sigmoid_backward"),
    Family(
        2,
        "out",
        "x > 0 ? g : a g; g inside two bounds",
        """leaky_relu_backward rrelu_with_noise_backward hardtanh_backward hardshrink_backward softshrink_backward""",
    ),
    Family(3, "out", "g / 6 inside two bounds", "hardsigmoid_backward"),
    Family(5, "out", "hard swish': g (x / 3 + 1 / 2) inside two bounds", "hardswish_backward"),
    Family(3, "out", "prelu': x > 0 ? g : w g, and x g for w", "_prelu_kernel_backward"),
    Family(3, "out", "logit': g / (x (1 - x))", "logit_backward"),
    Family(8, "in", "glu': s g, and (1 - s) s g a", "glu_backward"),
    Family(10, "in", "tangent of glu'", "glu_backward_jvp"),
    Family(2, "out", "x mask scale", "native_dropout_backward _fused_dropout _masked_scale quantized::dropout"),
    # --- softmax --------------------------------------------------------------------------------
    Family(
        5,
        "in",
        "softmax: max, x - max, exp, sum, divide (log: subtract)",
        """softmax log_softmax _softmax _log_softmax _safe_softmax _masked_softmax special_softmax
        special_log_softmax _sparse_softmax _sparse_log_softmax _nested_tensor_softmax_with_shape quantized::softmax""",
    ),
    Family(
        4,
        "in",
        "softmax': y (g - sum(g y)); log: g - exp(y) sum(g)",
        """_softmax_backward_data _log_softmax_backward_data _masked_softmax_backward _sparse_softmax_backward_data
        _sparse_log_softmax_backward_data""",
    ),
    Family(4, "in", "max + log(sum(exp(x - max)))", "logsumexp special_logsumexp"),
    # --- reductions and scans -------------------------------------------------------------------
    Family(
        1,
        "in",
        "sum, mean, product, maximum",
        """sum mean nansum prod amax amin _sparse_sum _sparse_csr_sum _sparse_csr_prod cumsum cumprod cummax cummin
        _cummax_helper _cummin_helper segment_reduce _segment_reduce_backward prims::sum prims::prod prims::amax
        prims::amin inductor::accumulate_grad""",
    ),
    Family(2, "in", "minimum and maximum", "aminmax _aminmax"),
    Family(2, "in", "norm: |x|^p, sum", """norm linalg_vector_norm linalg__powsum native_norm frobenius_norm"""),
    Family(3, "in", "norm of a - b", "dist"),
    Family(3, "in", "norm 2, scale 1", "renorm _weight_norm_interface"),
    Family(5, "in", "weight norm': sum(g v) 2, (g w - v s) / n 3", "_weight_norm_interface_backward"),
    Family(
        4,
        "in",
        "variance: mean, x - mean, square, sum",
        """var std var_mean std_mean batch_norm_stats batch_norm_update_stats prims::var""",
    ),
    Family(4, "in", "sum(dy), sum(dy (x - mean))", "batch_norm_backward_reduce"),
    Family(5, "in", "(dy - a - (x - mean) b) c", "batch_norm_backward_elemt"),
    Family(7, "in", "running logaddexp", "logcumsumexp _logcumsumexp"),
    Family(
        2,
        "in",
        "bin = (x - min) / width",
        """histc histogram _histogramdd_from_bin_cts _histogramdd_from_bin_tensors""",
    ),
    # --- normalisations with statistics given, and quantised ones ---------------------------------
    Family(
        4,
        "out",
        "(x - mean) / std w + b",
        """quantized::batch_norm quantized::batch_norm1d quantized::batch_norm2d quantized::batch_norm3d
        onednn::qbatch_norm2d""",
    ),
    Family(
        5,
        "out",
        "max((x - mean) / std w + b, 0)",
        """quantized::batch_norm_relu quantized::batch_norm1d_relu quantized::batch_norm2d_relu
        quantized::batch_norm3d_relu""",
    ),
    Family(
        7,
        "out",
        "mean, variance, (x - mean) / std w + b",
        """quantized::layer_norm quantized::group_norm quantized::instance_norm""",
    ),
    Family(
        7,
        "in",
        "fake quantise: x / s + z, round, clamp, (q - z) s",
        """fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask
        _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine
        _fake_quantize_learnable_per_channel_affine""",
    ),
    Family(
        9,
        "in",
        "minimum and maximum, fake quantise",
        """_fused_moving_avg_obs_fq_helper _fused_moving_avg_obs_fq_helper_functional""",
    ),
    Family(
        12,
        "in",
        "fake quantise, gradients of x 1, s 3, z 1",
        """_fake_quantize_learnable_per_tensor_affine_backward _fake_quantize_learnable_per_channel_affine_backward""",
    ),
    # --- interpolation: sizes do not change the taps ----------------------------------------------
    Family(3, "out", "w0 a + w1 b", "upsample_linear1d"),
    Family(9, "out", "three linear interpolations", "upsample_bilinear2d"),
    Family(21, "out", "seven linear interpolations", "upsample_trilinear3d"),
    Family(35, "out", "five cubic interpolations of 4 taps, 7 each", "upsample_bicubic2d"),
    Family(4, "in", "2 taps: multiply, add", "upsample_linear1d_backward"),
    Family(12, "in", "4 taps: weight 1, multiply, add", "upsample_bilinear2d_backward"),
    Family(32, "in", "8 taps: weight 2, multiply, add", "upsample_trilinear3d_backward"),
    Family(48, "in", "16 taps: weight 1, multiply, add", "upsample_bicubic2d_backward"),
    # --- gradients added where they came from -----------------------------------------------------
    Family(
        1,
        "in",
        "add each gradient to its source",
        """embedding_dense_backward max_pool2d_backward max_pool2d_with_indices_backward
        max_pool3d_with_indices_backward mkldnn_max_pool2d_backward mkldnn_max_pool3d_backward
        adaptive_max_pool2d_backward adaptive_max_pool3d_backward fractional_max_pool2d_backward
        fractional_max_pool3d_backward upsample_nearest1d_backward upsample_nearest2d_backward
        upsample_nearest3d_backward _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward
        _upsample_nearest_exact3d_backward reflection_pad1d_backward reflection_pad2d_backward
        reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
        unfold_backward col2im torchvision::_roi_pool_backward""",
    ),
    # --- losses backward --------------------------------------------------------------------------
    Family(3, "out", "mse': g c (x - t)", "mse_loss_backward"),
    Family(6, "out", "smooth l1': g c clamp((x - t) / b, -1, 1)", "smooth_l1_loss_backward"),
    Family(5, "out", "huber': g c clamp(x - t, -d, d)", "huber_loss_backward"),
    Family(8, "out", "soft margin': -t z / (1 + z) g c, z = exp(-t x)", "soft_margin_loss_backward"),
    Family(5, "out", "multi margin': m - x[t] + x 2, power 1, g c 2", "multi_margin_loss_backward"),
    # --- optimizers and gradient scaling ----------------------------------------------------------
    Family(1, "in", "g / scale; scale c", "_amp_foreach_non_finite_check_and_unscale _amp_update_scale"),
    Family(16, "in", "gru': dn dz dhx 5, tanh' 3, dr 1, d(hn) 1, sigmoid' 6", "_thnn_fused_gru_cell_backward"),
    # --- lists of tensors -------------------------------------------------------------------------
    Family(
        1,
        "in",
        "one primitive each",
        """_foreach_mul _foreach_div _foreach_neg _foreach_abs _foreach_sign _foreach_reciprocal _foreach_sqrt
        _foreach_rsqrt _foreach_pow _foreach_exp _foreach_expm1 _foreach_log _foreach_log10 _foreach_log1p
        _foreach_log2 _foreach_sin _foreach_cos _foreach_tan _foreach_asin _foreach_acos _foreach_atan _foreach_sinh
        _foreach_cosh _foreach_tanh _foreach_erf _foreach_erfc _foreach_lgamma _foreach_ceil _foreach_floor
        _foreach_round _foreach_trunc _foreach_max _foreach_maximum _foreach_minimum _foreach_clamp_max
        _foreach_clamp_min""",
    ),
    Family(2, "in", "frac; norm: |x|^p, sum", "_foreach_frac _foreach_norm _foreach_powsum"),
    Family(3, "in", "lerp", "_foreach_lerp"),
    Family(4, "in", "sigmoid", "_foreach_sigmoid"),
)


def qualified(names: str) -> list[str]:
    """Operator names of a table row; `aten::` where no namespace is given."""
    return [name if "::" in name else f"aten::{name}" for name in names.split()]


_DEPENDENT: dict[str, Callable[..., int]] = {
    **pointwise.COSTS,
    **normalization.COSTS,
    **losses.COSTS,
    **accumulation.COSTS,
    **resampling.COSTS,
}

ELEMENTWISE: dict[str, Elementwise] = {
    **{name: Elementwise(row.cost, row.per) for row in FAMILIES for name in qualified(row.names)},
    **{name: Elementwise(0, "out", cost_of) for name, cost_of in _DEPENDENT.items()},
}


def elementwise_flops(entry: Elementwise, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Elementwise FLOPs of one call. Raises LengthsUnknown where the count depends on values not carried."""
    if entry.cost_of is not None:
        return entry.cost_of(*args, **{**kwargs, "out": out}) if kwargs else entry.cost_of(*args, out=out)
    if entry.per == "out":
        return entry.cost * _elements(out if isinstance(out, tuple) else (out,))
    return entry.cost * _elements(args)


def _elements(values: Sequence[Any]) -> int:
    """Elements of the first tensor, or of all tensors of the first list, among values; 0 where there is none."""
    for value in values:
        if hasattr(value, "numel"):
            elements: int = value.numel()
            return elements
        if isinstance(value, list) and value and hasattr(value[0], "numel"):
            return sum(tensor.numel() for tensor in value)
    return 0
