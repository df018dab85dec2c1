"""Elementwise costs that depend on an argument: scale factors, bounds, approximations, fused optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flopprof.formulas.shaped import Shaped


def _total(tensors: Sequence[Shaped]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def scaled_sum(_a: Any, _b: Any, alpha: object = 1, *, out: Shaped, **_: Any) -> int:
    """a + alpha b: 1, or 2 where alpha is not 1."""
    return (1 + (alpha != 1)) * out.numel()


def scaled_sum_relu(_a: Any, _b: Any, *, alpha: object = 1, out: Shaped, **_: Any) -> int:
    """max(a + alpha b, 0): 2, or 3 where alpha is not 1."""
    return (2 + (alpha != 1)) * out.numel()


def foreach_scaled_sum(tensors: Sequence[Shaped], _other: Any, *, alpha: object = 1, **_: Any) -> int:
    """a + alpha b over a list: 1, or 2 where alpha is not 1."""
    return (1 + (alpha != 1)) * _total(tensors)


def scaled_product_sum(_a: Any, _b: Any, _c: Any, *, value: object = 1, out: Shaped, **_: Any) -> int:
    """a + value b c (or value b / c): 2, or 3 where value is not 1."""
    return (2 + (value != 1)) * out.numel()


def foreach_scaled_product_sum(tensors: Sequence[Shaped], _b: Any, _c: Any, value: object = 1, **_: Any) -> int:
    """a + value b c (or value b / c) over a list: 2, or 3 where a value is given and not 1."""
    scaled = not isinstance(value, int | float) or value != 1
    return (2 + scaled) * _total(tensors)


def outer_sum(_a: Any, _u: Any, _v: Any, *, beta: object = 1, alpha: object = 1, out: Shaped, **_: Any) -> int:
    """beta a + alpha u v^T: 2, and 1 for each factor that is not 1."""
    return (2 + (beta != 1) + (alpha != 1)) * out.numel()


def division(_a: Any, _b: Any, *, rounding_mode: str | None = None, out: Shaped, **_: Any) -> int:
    """a / b: 1; rounded: 2."""
    return (1 + (rounding_mode is not None)) * out.numel()


def clamp(_x: Any, lower: Any = None, upper: Any = None, *, out: Shaped, **kwargs: Any) -> int:
    """min(max(x, lower), upper): 1 for each bound given."""
    lower = kwargs.get("min", lower)
    upper = kwargs.get("max", upper)
    return ((lower is not None) + (upper is not None)) * out.numel()


def extremum(x: Shaped, other: Any = None, *_: Any, out: Any, **__: Any) -> int:
    """Maximum over x: 1 per element of x; maximum of two tensors: 1 per element of the result."""
    return out.numel() if hasattr(other, "numel") else x.numel()


def gelu(x: Shaped, *, approximate: str = "none", **_: Any) -> int:
    """x / 2 (1 + erf(x / sqrt 2)): 5; x / 2 (1 + tanh(k (x + c x^3))): 9."""
    return (9 if approximate == "tanh" else 5) * x.numel()


def gelu_backward(grad: Shaped, _x: Any, *, approximate: str = "none", **_: Any) -> int:
    """g (cdf(x) + x pdf(x)), cdf 4, pdf 4: 11; tanh: inner 5, tanh 1, product rule 10, g 2: 18."""
    return (18 if approximate == "tanh" else 11) * grad.numel()


def elu(x: Shaped, _alpha: Any = 1, scale: object = 1, input_scale: object = 1, **_: Any) -> int:
    """x > 0 ? x : alpha (exp(x) - 1): 4, and 1 for each outer and inner scale (selu) that is not 1."""
    return (4 + (scale != 1) + (input_scale != 1)) * x.numel()


def logit(x: Shaped, eps: Any = None, **_: Any) -> int:
    """log(x / (1 - x)): 3, and 2 where x is clamped by eps."""
    return (3 + 2 * (eps is not None)) * x.numel()


def mvlgamma(x: Shaped, p: int, **_: Any) -> int:
    """sum over i < p of lgamma(x - i / 2): 3 p."""
    return 3 * p * x.numel()


def trace(x: Shaped, **_: Any) -> int:
    """Sum of the diagonal: 1 per diagonal element."""
    rows, columns = x.shape
    return rows if rows < columns else columns


def native_dropout(x: Shaped, _p: float, train: bool | None = None, **_: Any) -> int:
    """x mask / (1 - p): 2 in training, 0 in evaluation; the random numbers are free."""
    return 0 if train is False else 2 * x.numel()


def batch_statistics_merge(_x: Any, mean: Shaped, *_: Any, **__: Any) -> int:
    """Merge (mean, 1 / std) over ranks: variance 4, its sum 5, mean 4: 13 per rank and channel."""
    return 13 * mean.numel()


def rescale_qkv(qkv: Shaped, _bias: Any, _heads: int, **_: Any) -> int:
    """qkv + bias, and q / sqrt(d): 1 per element of q, k, v and 1 per element of q."""
    return qkv.numel() + qkv.numel() // 3


def linear_combination(x: Shaped, coefficients: Shaped, **_: Any) -> int:
    """(m, n) coefficients of n tensors: 2 m n per element of one tensor."""
    return 2 * coefficients.shape[0] * x.numel()


def lstm_gates(_input: Any, _hidden: Any, cell: Shaped, bias: object = None, *_: Any, **__: Any) -> int:
    """Gates: sums 4, sigmoids 12, tanh 1; c = f c + i g: 3; h = o tanh(c): 2; biases 8: 22 or 30 per unit."""
    return (22 + 8 * (bias is not None)) * cell.numel()


def lstm_gates_backward(_grad_h: Any, _grad_c: Any, cell: Shaped, *_: Any, **__: Any) -> int:
    """dc 6, do 1, di df dg 3, dc_prev 1, three sigmoids' 9, one tanh' 3: 23 per unit."""
    return 23 * cell.numel()


def gru_gates(_input: Any, _hidden: Any, state: Shaped, bias: object = None, *_: Any, **__: Any) -> int:
    """r and z: sums 2, sigmoids 8; n = tanh(a + r b): 3; h = (1 - z) n + z h: 4; biases 6: 17 or 23 per unit."""
    return (17 + 6 * (bias is not None)) * state.numel()


def fused_adam(params: Sequence[Shaped], *_: Any, decay: int, **options: Any) -> int:
    """m 3, v 4, sqrt(v) / c + eps 3, p - lr m / d 3: 13; weight decay, amsgrad, maximize, grad_scale add theirs."""
    per_element = 13 + decay * _nonzero(options["weight_decay"])
    per_element += bool(options["amsgrad"]) + bool(options["maximize"]) + (options.get("grad_scale") is not None)
    return per_element * _total(params)


def adam(params: Sequence[Shaped], *args: Any, **options: Any) -> int:
    """Adam: 13, and g + w p: 2 with weight decay; 1 each for amsgrad, maximize and grad_scale."""
    return fused_adam(params, *args, decay=2, **options)


def adamw(params: Sequence[Shaped], *args: Any, **options: Any) -> int:
    """AdamW: 13, and p (1 - lr w): 1 with weight decay; 1 each for amsgrad, maximize and grad_scale."""
    return fused_adam(params, *args, decay=1, **options)


def sgd(params: Sequence[Shaped], *_: Any, **options: Any) -> int:
    """p - lr g: 2; g + w p: 2; momentum after the first step: 2 (3 with dampening); Nesterov 2; grad_scale 1."""
    per_element = 2 + 2 * _nonzero(options["weight_decay"])
    per_element += bool(options["maximize"]) + (options.get("grad_scale") is not None)
    if _nonzero(options["momentum"]):
        if not options["is_first_step"]:
            per_element += 2 + _nonzero(options["dampening"])
        per_element += 2 * bool(options["nesterov"])
    return per_element * _total(params)


def adagrad(params: Sequence[Shaped], *_: Any, **options: Any) -> int:
    """s + g g: 2; p - lr g / (sqrt(s) + eps): 5; weight decay 2; maximize 1; grad_scale 1."""
    per_element = 7 + 2 * _nonzero(options["weight_decay"])
    per_element += bool(options["maximize"]) + (options.get("grad_scale") is not None)
    return per_element * _total(params)


def _nonzero(factor: float) -> int:
    return int(factor != 0)


def _elu_backward(grad: Shaped, _alpha: Any, scale: object, input_scale: object, *_: Any, **__: Any) -> int:
    """x > 0 ? g : g alpha exp(x): 4, and 1 for each outer and inner scale that is not 1."""
    return elu(grad, 1, scale, input_scale)


COSTS: dict[str, Callable[..., int]] = {
    "aten::add": scaled_sum,
    "aten::sub": scaled_sum,
    "aten::rsub": scaled_sum,
    "aten::subtract": scaled_sum,
    "aten::_add_relu": scaled_sum_relu,
    "aten::_foreach_add": foreach_scaled_sum,
    "aten::_foreach_sub": foreach_scaled_sum,
    "aten::addcmul": scaled_product_sum,
    "aten::addcdiv": scaled_product_sum,
    "aten::_foreach_addcmul": foreach_scaled_product_sum,
    "aten::_foreach_addcdiv": foreach_scaled_product_sum,
    "aten::addr": outer_sum,
    "aten::div": division,
    "aten::divide": division,
    "aten::clamp": clamp,
    "aten::max": extremum,
    "aten::min": extremum,
    "aten::gelu": gelu,
    "aten::gelu_backward": gelu_backward,
    "aten::elu": elu,
    "aten::elu_backward": _elu_backward,
    "aten::logit": logit,
    "aten::mvlgamma": mvlgamma,
    "aten::trace": trace,
    "aten::native_dropout": native_dropout,
    "aten::batch_norm_gather_stats": batch_statistics_merge,
    "aten::batch_norm_gather_stats_with_counts": batch_statistics_merge,
    "aten::_transform_bias_rescale_qkv": rescale_qkv,
    "aten::_compute_linear_combination": linear_combination,
    "aten::_thnn_fused_lstm_cell": lstm_gates,
    "aten::_thnn_fused_lstm_cell_backward_impl": lstm_gates_backward,
    "aten::_thnn_fused_gru_cell": gru_gates,
    "aten::_fused_adam": adam,
    "aten::_fused_adamw": adamw,
    "aten::_fused_sgd": sgd,
    "aten::_fused_adagrad": adagrad,
}
