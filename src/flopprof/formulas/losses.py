"""Elementwise costs of losses; a reduction (1 mean, 2 sum; 0 none) adds 1 per element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flopprof.formulas.attention import lengths
from flopprof.formulas.registry import LengthsUnknown
from flopprof.formulas.shaped import Shaped


def _reduced(reduction: int) -> int:
    return int(reduction != 0)


def mse_loss(x: Shaped, _target: Any, reduction: int = 1, **_: Any) -> int:
    """(x - t)^2: 2."""
    return (2 + _reduced(reduction)) * x.numel()


def smooth_l1_loss(x: Shaped, _target: Any, reduction: int = 1, *_: Any, **__: Any) -> int:
    """z = |x - t|, z z / 2 / beta: 5."""
    return (5 + _reduced(reduction)) * x.numel()


def huber_loss(x: Shaped, _target: Any, reduction: int = 1, *_: Any, **__: Any) -> int:
    """z = |x - t|, z z / 2: 4."""
    return (4 + _reduced(reduction)) * x.numel()


def soft_margin_loss(x: Shaped, _target: Any, reduction: int = 1, **_: Any) -> int:
    """log1p(exp(-t x)): 4."""
    return (4 + _reduced(reduction)) * x.numel()


def binary_cross_entropy(x: Shaped, _target: Any, weight: Any = None, reduction: int = 1, **_: Any) -> int:
    """-(t log x + (1 - t) log(1 - x)): 8, weight 1."""
    return (8 + (weight is not None) + _reduced(reduction)) * x.numel()


def binary_cross_entropy_backward(
    _grad: Any, x: Shaped, _target: Any, weight: Any = None, reduction: int = 1, **_: Any
) -> int:
    """g (x - t) / (x (1 - x)): 5, weight 1, mean's division 1."""
    return (5 + (weight is not None) + (reduction == 1)) * x.numel()


def binary_cross_entropy_with_logits(
    x: Shaped, _target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1, **_: Any
) -> int:
    """(1 - t) x - logsigmoid(x): 9; weight 1; pos_weight ((p - 1) t + 1 times): 4."""
    return (9 + (weight is not None) + 4 * (pos_weight is not None) + _reduced(reduction)) * x.numel()


def nll_loss(_x: Any, target: Shaped, weight: Any = None, reduction: int = 1, *_: Any, **__: Any) -> int:
    """-x[t]: 1 per target, weight 1."""
    return (1 + (weight is not None) + _reduced(reduction)) * target.numel()


def nll_loss_backward(
    _grad: Any, _x: Any, target: Shaped, weight: Any = None, reduction: int = 1, *_: Any, **__: Any
) -> int:
    """-g: 1 per target, weight 1, mean's division 1."""
    return (1 + (weight is not None) + (reduction == 1)) * target.numel()


def multi_margin_loss(
    x: Shaped, _target: Any, _p: Any = 1, _margin: Any = 1, weight: Any = None, reduction: int = 1, **_: Any
) -> int:
    """sum over classes of max(0, m - x[t] + x)^p: 5, weight 1."""
    return (5 + (weight is not None) + _reduced(reduction)) * x.numel()


def _lattice(log_probs: Shaped, input_lengths: Any, target_lengths: Any) -> int:
    """Cells (time, position in blank-separated target) of a batch."""
    pairs = zip(_read(input_lengths), _read(target_lengths), strict=True)
    return sum(time * (2 * length + 1) for time, length in pairs)


def _read(given: Any) -> Sequence[int]:
    """As a list, or a tensor whose values lie on the CPU: a device is not waited for."""
    if isinstance(given, Sequence):
        return given
    if not given.is_cpu:
        raise LengthsUnknown("ctc_loss got its lengths as tensors without values, or on a device")
    return lengths(given)


def ctc_loss(log_probs: Shaped, _targets: Any, input_lengths: Any, target_lengths: Any, *_: Any, **__: Any) -> int:
    """log p + logsumexp of three predecessors: 13 per lattice cell T (2 L + 1)."""
    return 13 * _lattice(log_probs, input_lengths, target_lengths)


def ctc_loss_backward(
    _grad: Any, log_probs: Shaped, _targets: Any, input_lengths: Any, target_lengths: Any, *_: Any, **__: Any
) -> int:
    """Backward recursion 13 and logaddexp(alpha + beta) 8 per lattice cell; exp, subtract, scale: 3 per log p."""
    return 21 * _lattice(log_probs, input_lengths, target_lengths) + 3 * log_probs.numel()


def device_ctc_loss(
    log_probs: Shaped, targets: Any, input_lengths: Any, target_lengths: Any, *_: Any, **__: Any
) -> int:
    """Loss and gradient in one call: the two above."""
    forward = ctc_loss(log_probs, targets, input_lengths, target_lengths)
    return forward + ctc_loss_backward(None, log_probs, targets, input_lengths, target_lengths)


COSTS: dict[str, Callable[..., int]] = {
    "aten::mse_loss": mse_loss,
    "aten::smooth_l1_loss": smooth_l1_loss,
    "aten::huber_loss": huber_loss,
    "aten::soft_margin_loss": soft_margin_loss,
    "aten::binary_cross_entropy": binary_cross_entropy,
    "aten::binary_cross_entropy_backward": binary_cross_entropy_backward,
    "aten::binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "aten::nll_loss_forward": nll_loss,
    "aten::nll_loss2d_forward": nll_loss,
    "aten::nll_loss_backward": nll_loss_backward,
    "aten::nll_loss2d_backward": nll_loss_backward,
    "aten::multi_margin_loss": multi_margin_loss,
    "aten::_ctc_loss": ctc_loss,
    "aten::_ctc_loss_backward": ctc_loss_backward,
    "aten::_cudnn_ctc_loss": device_ctc_loss,
    "aten::miopen_ctc_loss": device_ctc_loss,
}
