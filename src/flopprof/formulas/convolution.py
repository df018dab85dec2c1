"""Convolutions: each output element (transposed: each input element) meets every tap of its group's kernel once.

Taps on padding count. A weight (n, c/groups, *kernel) has c/groups * kernel taps, so groups need no argument.
"""

from __future__ import annotations

from typing import Any

from flopprof.formulas.operand import Tensor, Wanted
from flopprof.formulas.registry import formula, product


def conv_flops(x: Tensor, weight: Tensor, out: Any, transposed: bool) -> int:
    """2 * elements * taps: elements of the output, or of the input if transposed; any rank, batched or not."""
    elements = x if transposed else out
    return 2 * product(elements.shape) * product(weight.shape[1:])


@formula("aten::convolution", "aten::_convolution", "aten::convolution_overrideable")
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *_: Any,
    out: Any,
    **__: Any,
) -> int:
    """2 out c/groups kernel; transposed: 2 in n/groups kernel."""
    return conv_flops(x, weight, out, transposed)


@formula(
    "aten::conv1d",
    "aten::conv2d",
    "aten::conv3d",
    "aten::_convolution_mode",
    "aten::cudnn_convolution",
    "aten::cudnn_convolution_relu",
    "aten::cudnn_convolution_add_relu",
    "aten::miopen_convolution",
    "aten::miopen_convolution_relu",
    "aten::miopen_convolution_add_relu",
    "aten::miopen_depthwise_convolution",
    "aten::_mps_convolution",
    "aten::mkldnn_convolution",
    "aten::_nnpack_spatial_convolution",
    "aten::thnn_conv2d",
    "aten::_slow_conv2d_forward",
    "aten::slow_conv3d",
    "aten::slow_conv3d_forward",
    "aten::slow_conv_dilated2d",
    "aten::slow_conv_dilated3d",
    "aten::_conv_depthwise2d",
    "aten::conv_depthwise3d",
    "torchvision::deform_conv2d",
)
def conv(x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """2 out c/groups kernel; the interpolation of a deformable one is elementwise."""
    return conv_flops(x, weight, out, transposed=False)


@formula(
    "aten::conv_transpose1d",
    "aten::conv_transpose2d",
    "aten::conv_transpose3d",
    "aten::cudnn_convolution_transpose",
    "aten::miopen_convolution_transpose",
    "aten::_mps_convolution_transpose",
    "aten::slow_conv_transpose2d",
    "aten::slow_conv_transpose3d",
)
def conv_transpose(x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """2 in n/groups kernel; output padding adds nothing."""
    return conv_flops(x, weight, out, transposed=True)


@formula("aten::convolution_backward", operands=(0, 1, 2))
def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
    *,
    out: Any,
) -> int:
    """Input and weight gradient, each exactly the forward's FLOPs, whatever the groups."""
    return conv_flops(x, weight, grad, transposed) * sum(map(bool, output_mask[:2]))


@formula("aten::convolution_backward_overrideable", operands=(0, 1, 2))
def convolution_backward_overrideable(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
    *,
    out: Any,
) -> int:
    """Input and weight gradient, each exactly the forward's FLOPs."""
    return conv_flops(x, weight, grad, transposed) * sum(map(bool, output_mask[:2]))


@formula("aten::_slow_conv2d_backward", operands=(0, 1, 2))
def slow_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    output_mask: Any = (True, True, True),
    *,
    out: Any,
    **_: Any,
) -> int:
    """Input and weight gradient, each exactly the forward's FLOPs."""
    return conv_flops(x, weight, grad, transposed=False) * sum(map(bool, output_mask[:2]))


@formula("aten::mps_convolution_backward", operands=(0, 1, 2))
def mps_convolution_backward(x: Tensor, grad: Tensor, weight: Tensor, *args: Any, out: Any) -> int:
    """Input and weight gradient, each exactly the forward's FLOPs; the mask comes last."""
    return conv_flops(x, weight, grad, transposed=False) * sum(map(bool, args[-1][:2]))


@formula("aten::mps_convolution_transpose_backward", operands=(0, 1, 2))
def mps_convolution_transpose_backward(x: Tensor, grad: Tensor, weight: Tensor, *args: Any, out: Any) -> int:
    """Input and weight gradient of a transposed convolution; the mask comes last."""
    return conv_flops(x, weight, grad, transposed=True) * sum(map(bool, args[-1][:2]))


@formula("aten::conv_tbc")
def conv_tbc(x: Tensor, weight: Tensor, bias: Any, pad: int = 0, *, out: Any, **_: Any) -> int:
    """(t, b, c), weight (kernel, c, n): 2 out kernel c."""
    kernel, channels, _n = weight.shape
    return 2 * product(out.shape) * kernel * channels


@formula("torchvision::_deform_conv2d_backward", operands=(0, 1, 2), wanted=True)
def deform_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, *_: Any, out: Any, wanted: Wanted = None) -> int:
    """Weight gradient, and W^T @ grad once for the input, the offsets and the mask: each 2 out c/groups kernel.

    Edges of the node: input, weight, offset, mask, bias.
    """
    for_input, for_weight, for_offset, for_mask = wanted[:4] if wanted else (True, True, True, True)
    products = bool(for_weight) + bool(for_input or for_offset or for_mask)
    return conv_flops(x, weight, grad, transposed=False) * products


@formula("mkldnn::_convolution_pointwise", operands=(0, 1))
def convolution_pointwise(x: Tensor, *args: Any, out: Tensor, **_: Any) -> int:
    """2 out c/groups kernel, the weight possibly packed: its elements over the output channels are the taps.

    Arguments are (x, weight, bias or None ...), binary (x, other, weight, ...), in place (other, x, weight, ...).
    """
    # Binary forms hold three tensors before the bias: the weight is then the third argument.
    binary = len(args) > 2 and hasattr(args[1], "shape") and len(args[1].shape) > 1
    weight = args[1] if binary else args[0]
    return 2 * product(out.shape) * (product(weight.shape) // out.shape[1])


@formula("mkldnn::_convolution_transpose_pointwise")
def convolution_transpose_pointwise(x: Tensor, weight: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    """2 in n/groups kernel; the packed weight is (n, c/groups, *kernel), so divide its elements by the c channels."""
    return 2 * product(x.shape) * (product(weight.shape) // x.shape[1])


@formula(
    "onednn::qconv_pointwise",
    "onednn::qconv1d_pointwise",
    "onednn::qconv2d_pointwise",
    "onednn::qconv3d_pointwise",
    operands=(0, 3),
)
def qconv_pointwise(x: Tensor, scale: Any, zero_point: Any, weight: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    """2 out c/groups kernel, the weight possibly packed."""
    return 2 * product(out.shape) * (product(weight.shape) // out.shape[1])
