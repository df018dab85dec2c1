"""Elementwise costs of normalisations: per element of the input; what is once per row or channel is 0.

Forward: mean 1, x - mean 1, square and sum 2, times 1 / std 1; with weight 1, with bias 1.
Backward: xhat = (x - mean) / std 2; dx = (gw - mean(gw) - xhat mean(gw xhat)) / std 7, gw = g w 1 where
there is a weight; dw = sum(g xhat) 2; db = sum(g) 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flopprof.formulas.shaped import Shaped


def _affine(weight: Any, bias: Any) -> int:
    return (weight is not None) + (bias is not None)


def _backward(wanted: Sequence[bool], weight: Any) -> int:
    dx, dw, db = wanted
    return 2 * (dx or dw) + (7 + (weight is not None)) * dx + 2 * dw + db


def layer_norm(x: Shaped, _shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> int:
    """(x - mean) / std w + b: 5, weight 1, bias 1."""
    return (5 + _affine(weight, bias)) * x.numel()


def group_norm(x: Shaped, weight: Any, bias: Any, *_: Any, **__: Any) -> int:
    """(x - mean) / std w + b within a group: 5, weight 1, bias 1."""
    return (5 + _affine(weight, bias)) * x.numel()


def batch_norm(x: Shaped, weight: Any, bias: Any, *rest: Any, **_: Any) -> int:
    """Training: 5; evaluation, with the running mean and std: 2; weight 1, bias 1.

    `training` follows running_mean and running_var, or, in the overload without statistics, the bias.
    """
    training = rest[0] if isinstance(rest[0], bool) else rest[2]
    return ((5 if training else 2) + _affine(weight, bias)) * x.numel()


def batch_norm_training(x: Shaped, weight: Any, bias: Any, *_: Any, **__: Any) -> int:
    """Statistics of the batch: 5, weight 1, bias 1."""
    return (5 + _affine(weight, bias)) * x.numel()


def batch_norm_evaluation(x: Shaped, weight: Any, bias: Any, *_: Any, **__: Any) -> int:
    """Statistics given: x - mean 1, times 1 / std 1, weight 1, bias 1."""
    return (2 + _affine(weight, bias)) * x.numel()


def rms_norm(x: Shaped, _shape: Any, weight: Any = None, *_: Any, **__: Any) -> int:
    """x / rms(x) w: square and sum 2, times 1 / rms 1, weight 1."""
    return (3 + (weight is not None)) * x.numel()


def layer_norm_backward(
    grad: Shaped, _x: Any, _shape: Any, _mean: Any, _rstd: Any, weight: Any, _bias: Any, wanted: Any, **_: Any
) -> int:
    """dx 9 (10 with weight), dw 2, db 1, of those wanted."""
    return _backward(wanted, weight) * grad.numel()


def group_norm_backward(grad: Shaped, _x: Any, _mean: Any, _rstd: Any, weight: Any, *sizes: Any, **_: Any) -> int:
    """dx 9 (10 with weight), dw 2, db 1, of those wanted."""
    return _backward(sizes[-1], weight) * grad.numel()


def batch_norm_backward(grad: Shaped, _x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Training: dx 9 (10 with weight), dw 2, db 1; evaluation: dx = g (w / std) 1, dw 4, db 1."""
    training, _eps, wanted = rest[4:7]
    if training:
        return _backward(wanted, weight) * grad.numel()
    dx, dw, db = map(bool, wanted)
    return (dx + 4 * dw + db) * grad.numel()


def device_batch_norm_backward(x: Shaped, _grad: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Training, every gradient: 12, and 1 with weight."""
    return _backward((True, True, True), weight) * x.numel()


def rms_norm_backward(
    grad: Shaped, _x: Any, _shape: Any, _rstd: Any, weight: Any, wanted: Sequence[bool], **_: Any
) -> int:
    """xhat 1; dx = (gw - xhat mean(gw xhat)) / rms 5 (6 with weight); dw = sum(g xhat) 2; of those wanted."""
    dx, dw = wanted
    return ((dx or dw) + (5 + (weight is not None)) * dx + 2 * dw) * grad.numel()


def synchronized_normalize(_x: Any, weight: Any, bias: Any, *_: Any, out: Shaped, **__: Any) -> int:
    """(x - mean) / std w + b with statistics of all ranks: 2, weight 1, bias 1."""
    return (2 + _affine(weight, bias)) * out.numel()


COSTS: dict[str, Callable[..., int]] = {
    "aten::layer_norm": layer_norm,
    "aten::native_layer_norm": layer_norm,
    "aten::native_layer_norm_backward": layer_norm_backward,
    "aten::native_group_norm": group_norm,
    "aten::native_group_norm_backward": group_norm_backward,
    "aten::batch_norm": batch_norm,
    "aten::native_batch_norm": batch_norm,
    "aten::cudnn_batch_norm": batch_norm,
    "aten::miopen_batch_norm": batch_norm,
    "aten::_native_batch_norm_legit": batch_norm,
    "aten::_native_batch_norm_legit_functional": batch_norm,
    "aten::_native_batch_norm_legit_no_training": batch_norm_evaluation,
    "aten::_batch_norm_no_update": batch_norm_evaluation,
    "aten::_batch_norm_with_update": batch_norm_training,
    "aten::_batch_norm_with_update_functional": batch_norm_training,
    "aten::quantized_batch_norm": batch_norm_evaluation,
    "aten::native_batch_norm_backward": batch_norm_backward,
    "aten::batch_norm_backward": batch_norm_backward,
    "aten::cudnn_batch_norm_backward": device_batch_norm_backward,
    "aten::miopen_batch_norm_backward": device_batch_norm_backward,
    "aten::batch_norm_elemt": synchronized_normalize,
    "aten::_fused_rms_norm": rms_norm,
    "aten::_fused_rms_norm_backward": rms_norm_backward,
}
