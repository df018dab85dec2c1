"""Elementwise costs of pooling, interpolation, grid sampling and regions of interest.

A window of K taps is K (K - 1 additions and a division, or K - 1 maxima), taps on padding included, as in a
convolution. A linear interpolation of two values is 3: w0 a + w1 b. Weights that rows or channels share are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from flopprof.formulas.registry import LengthsUnknown, product
from flopprof.formulas.shaped import Shaped


def _window(kernel: Any, dims: int) -> int:
    """Taps of a window; one size stands for every dimension."""
    sizes = [kernel] if isinstance(kernel, int) else list(kernel)
    return product(sizes * dims if len(sizes) == 1 else sizes)


def _first(out: Any) -> Shaped:
    """The tensor itself, or the first of several results."""
    tensor: Shaped = out[0] if isinstance(out, tuple | list) else out
    return tensor


def _pool(dims: int) -> Callable[..., int]:
    def pool(_x: Any, kernel: Any, *_: Any, out: Any, **__: Any) -> int:
        """Window taps per element of the result."""
        return _window(kernel, dims) * _first(out).numel()

    return pool


def _average_pool_backward(dims: int) -> Callable[..., int]:
    def average_pool_backward(grad: Shaped, _x: Any, kernel: Any, *_: Any, **__: Any) -> int:
        """Divide once, add to every tap: K + 1 per element of the gradient."""
        return (_window(kernel, dims) + 1) * grad.numel()

    return average_pool_backward


def _adaptive_taps(x: Shaped, result: Shaped, dims: int) -> int:
    """Taps of adaptive windows, [floor(i n / m), ceil((i + 1) n / m)): n + m - gcd(n, m) along a dimension."""
    taps = product(x.shape[:-dims])
    for size, count in zip(x.shape[-dims:], result.shape[-dims:], strict=True):
        taps *= size if count == 1 else size + count - _common(size, count)
    return taps


def _common(size: int, count: int) -> int:
    """gcd(size, count). Of a symbolic size, whose divisors are not known, phi(d) for each d | count that divides it."""
    if isinstance(size, int):
        return gcd(size, count)
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    totients = {d: sum(gcd(k, d) == 1 for k in range(1, d + 1)) for d in divisors}
    return sum(totients[d] * (size // d - (size - 1) // d) for d in divisors)


def _adaptive_pool(dims: int) -> Callable[..., int]:
    def adaptive_pool(x: Shaped, *_: Any, out: Any, **__: Any) -> int:
        """1 per tap of every window; windows tile the input where its size divides, else they overlap."""
        return _adaptive_taps(x, _first(out), dims)

    return adaptive_pool


def _adaptive_average_pool_backward(dims: int) -> Callable[..., int]:
    def adaptive_average_pool_backward(grad: Shaped, x: Shaped, *_: Any, **__: Any) -> int:
        """Divide once per element of the gradient, add to every tap."""
        return _adaptive_taps(x, grad, dims) + grad.numel()

    return adaptive_average_pool_backward


def _widened(taps: int, size: int, count: int) -> int:
    """Taps of an antialiased kernel: shrinking n to m widens it ceil(n / m) times."""
    return taps * -(-size // count) if size > count else taps


def _antialias(x: Shaped, result: Shaped, taps: int) -> int:
    *_, height, width = x.shape
    *batch, out_height, out_width = result.shape
    along_width = product(batch) * height * out_width * _widened(taps, width, out_width)
    along_height = product(batch) * out_height * out_width * _widened(taps, height, out_height)
    return 2 * (along_width + along_height)


def _antialiased(taps: int) -> Callable[..., int]:
    def antialiased(x: Shaped, *_: Any, out: Shaped, **__: Any) -> int:
        """Width, then height: 2 per tap; a kernel that shrinks by s is ceil(s) times as wide."""
        return _antialias(x, out, taps)

    return antialiased


def _antialiased_backward(taps: int) -> Callable[..., int]:
    def antialiased_backward(grad: Shaped, *_: Any, out: Shaped, **__: Any) -> int:
        """The forward's taps, multiplied and added the other way."""
        return _antialias(out, grad, taps)

    return antialiased_backward


_SAMPLED = {0: 2, 1: 0, 2: 4}  # grid_sampler's interpolation_mode: bilinear, nearest, bicubic -> taps a dimension


def _sampled(mode: int, dims: int) -> int:
    return product([_SAMPLED[mode]] * dims)


def grid_sampler(x: Shaped, grid: Shaped, mode: int = 0, *_: Any, out: Shaped, **__: Any) -> int:
    """2 per tap (2^d bilinear, 4^d bicubic, nearest 0) and element; 3 per coordinate to reach pixels."""
    return 2 * _sampled(mode, x.dim() - 2) * out.numel() + 3 * grid.numel()


def grid_sampler_backward(grad: Shaped, x: Shaped, grid: Shaped, mode: int = 0, *_: Any, **__: Any) -> int:
    """Per element of the gradient and tap: 2 for the input, 3 d for the grid; 3 per coordinate."""
    dims = x.dim() - 2
    return (2 + 3 * dims) * _sampled(mode, dims) * grad.numel() + 3 * grid.numel()


def cudnn_grid_sampler(x: Shaped, grid: Shaped, *, out: Shaped, **_: Any) -> int:
    """grid_sampler, bilinear."""
    return grid_sampler(x, grid, out=out)


def cudnn_grid_sampler_backward(x: Shaped, grid: Shaped, grad: Shaped, **_: Any) -> int:
    """grid_sampler_backward, bilinear."""
    return grid_sampler_backward(grad, x, grid)


def affine_grid(theta: Shaped, *_: Any, out: Shaped, **__: Any) -> int:
    """theta (d, d + 1) times (x, y, 1): 2 (d + 1) per coordinate."""
    return 2 * theta.shape[-1] * out.numel()


def affine_grid_backward(grad: Shaped, *_: Any, **__: Any) -> int:
    """d theta = grad^T (x, y, 1): 2 (d + 1) per coordinate."""
    return 2 * (grad.shape[-1] + 1) * grad.numel()


def _samples(ratio: int) -> int:
    if ratio <= 0:
        raise LengthsUnknown("sampling_ratio <= 0 lets each box decide its number of samples")
    return ratio * ratio


def roi_align(_x: Any, _boxes: Any, _scale: float, _h: int, _w: int, ratio: int, *_: Any, out: Any, **__: Any) -> int:
    """ratio^2 samples a bin, each 4 taps multiplied and added: 8 ratio^2 per element of the result."""
    return 8 * _samples(ratio) * _first(out).numel()


def quantized_roi_align(*args: Any, out: Any, **_: Any) -> int:
    """As roi_align, with two scales and two zero points before the others."""
    *_rest, ratio, _aligned = args
    return 8 * _samples(ratio) * _first(out).numel()


def roi_align_backward(grad: Shaped, *args: Any, **_: Any) -> int:
    """8 ratio^2 per element of the gradient."""
    *_rest, ratio, _aligned = args
    return 8 * _samples(ratio) * grad.numel()


def ps_roi_align_backward(
    grad: Shaped, _boxes: Any, _channels: Any, _scale: float, _h: int, _w: int, ratio: int, *_: Any, **__: Any
) -> int:
    """8 ratio^2 per element of the gradient."""
    return 8 * _samples(ratio) * grad.numel()


def nms(boxes: Shaped, *_: Any, **__: Any) -> int:
    """Intersection over union of every pair, 12: n (n - 1) / 2 pairs, and 3 per box for its area."""
    count = boxes.shape[0]
    return 6 * count * (count - 1) + 3 * count


COSTS: dict[str, Callable[..., int]] = {
    **{f"aten::avg_pool{d}d": _pool(d) for d in (1, 2, 3)},
    **{f"aten::avg_pool{d}d_backward": _average_pool_backward(d) for d in (2, 3)},
    **{f"aten::max_pool{d}d": _pool(d) for d in (1, 2, 3)},
    **{f"aten::max_pool{d}d_with_indices": _pool(d) for d in (1, 2, 3)},
    **{f"aten::mkldnn_max_pool{d}d": _pool(d) for d in (2, 3)},
    **{f"aten::quantized_max_pool{d}d": _pool(d) for d in (1, 2, 3)},
    **{f"quantized::max_pool{d}d": _pool(d) for d in (1, 2)},
    **{f"aten::fractional_max_pool{d}d": _pool(d) for d in (2, 3)},
    **{f"aten::adaptive_avg_pool{d}d": _adaptive_pool(d) for d in (1, 2, 3)},
    **{f"aten::adaptive_max_pool{d}d": _adaptive_pool(d) for d in (1, 2, 3)},
    **{f"aten::_adaptive_avg_pool{d}d": _adaptive_pool(d) for d in (2, 3)},
    "aten::mkldnn_adaptive_avg_pool2d": _adaptive_pool(2),
    "aten::mkldnn_adaptive_avg_pool2d_backward": _adaptive_average_pool_backward(2),
    "aten::_adaptive_avg_pool2d_backward": _adaptive_average_pool_backward(2),
    "aten::_adaptive_avg_pool3d_backward": _adaptive_average_pool_backward(3),
    "aten::adaptive_avg_pool3d_backward": _adaptive_average_pool_backward(3),
    "aten::_upsample_bilinear2d_aa": _antialiased(2),
    "aten::_upsample_bicubic2d_aa": _antialiased(4),
    "aten::_upsample_lanczos2d_aa": _antialiased(6),
    "aten::_upsample_bilinear2d_aa_backward": _antialiased_backward(2),
    "aten::_upsample_bicubic2d_aa_backward": _antialiased_backward(4),
    "aten::_upsample_lanczos2d_aa_backward": _antialiased_backward(6),
    "aten::grid_sampler_2d": grid_sampler,
    "aten::grid_sampler_3d": grid_sampler,
    "aten::_grid_sampler_2d_cpu_fallback": grid_sampler,
    "aten::grid_sampler_2d_backward": grid_sampler_backward,
    "aten::grid_sampler_3d_backward": grid_sampler_backward,
    "aten::_grid_sampler_2d_cpu_fallback_backward": grid_sampler_backward,
    "aten::cudnn_grid_sampler": cudnn_grid_sampler,
    "aten::cudnn_grid_sampler_backward": cudnn_grid_sampler_backward,
    "aten::affine_grid_generator": affine_grid,
    "aten::cudnn_affine_grid_generator": affine_grid,
    "aten::cudnn_affine_grid_generator_backward": affine_grid_backward,
    "torchvision::roi_align": roi_align,
    "torchvision::qroi_align": quantized_roi_align,
    "torchvision::ps_roi_align": roi_align,
    "torchvision::_roi_align_backward": roi_align_backward,
    "torchvision::_ps_roi_align_backward": ps_roi_align_backward,
    "torchvision::nms": nms,
    "torchvision::qnms": nms,
}
