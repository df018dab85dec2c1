"""Cases of convolutions: elements of the result (transposed: of the input) times the taps of one group."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from case import Case, on_shapes


def backward(x: tuple[int, ...], weight: tuple[int, ...], frozen: str = "", **options: int) -> None:
    operands = [torch.ones(shape, requires_grad=name not in frozen) for name, shape in (("x", x), ("w", weight))]
    F.conv2d(*operands, **options).sum().backward()


def transposed_backward() -> None:
    x, weight = torch.ones(2, 4, 3, 3, requires_grad=True), torch.ones(4, 3, 2, 2, requires_grad=True)
    F.conv_transpose2d(x, weight, stride=2, output_padding=1, groups=2).sum().backward()


def thnn_backward() -> None:
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3, requires_grad=True)
    torch._C._nn.thnn_conv2d(x, weight, 3, None, 1, 0).sum().backward()


def deformable(device: str, x: bool = False, weight: bool = False, offset: bool = False) -> None:
    from torchvision.ops import deform_conv2d

    image = torch.ones(1, 4, 6, 6, device=device, requires_grad=x)
    kernel = torch.ones(6, 2, 3, 3, device=device, requires_grad=weight)
    shifts = torch.ones(1, 18, 6, 6, device=device, requires_grad=offset)
    result = deform_conv2d(image, shifts, kernel, padding=1)
    if x or weight or offset:
        result.sum().backward()


def pointwise(kind: str) -> None:
    ops = torch.ops.mkldnn
    x, plain = torch.ones(1, 4, 8, 8), [[0, 0], [1, 1], [1, 1], 2]
    if kind == "transposed":
        weight = ops._reorder_convolution_transpose_weight(torch.ones(4, 3, 3, 3), [0, 0], [0, 0], [1, 1], [1, 1], 2)
        ops._convolution_transpose_pointwise(x, weight, None, [0, 0], *plain, "none", [], "")
        return
    weight = ops._reorder_convolution_weight(torch.ones(6, 2, 3, 3), *plain, [1, 4, 8, 8])
    if kind == "binary":
        ops._convolution_pointwise.binary(x, torch.ones(1, 6, 6, 6), weight, None, *plain, "add", None, None, [], None)
    else:
        ops._convolution_pointwise(x, weight, torch.ones(6), *plain, "none", [], "")


def qconv(overload: str, dims: int) -> None:
    sizes, ones, zeros = [8] * dims, [1] * dims, [0] * dims
    weight = torch.ones(6, 2, *([3] * dims), dtype=torch.int8)
    packed = torch.ops.onednn.qconv_prepack(weight, torch.ones(6), 1.0, 0, ones, zeros, ones, 2, [1, 4, *sizes])
    x, scales, points = torch.ones(1, 4, *sizes, dtype=torch.uint8), torch.ones(6), torch.zeros(6, dtype=torch.long)
    layout = [None, ones, zeros, ones, 2, 1.0, 0, torch.float32, "none", [], ""]
    getattr(torch.ops.onednn, overload)(x, 1.0, 0, packed, scales, points, *layout)


CASES = [
    Case("aten::conv1d", [(2, 4, 9), (6, 4, 3)], 2016, "2*(2*6*7)*(4*3)"),
    Case("aten::conv1d", [(4, 9), (6, 4, 3)], 1008, "2*(6*7)*(4*3)"),
    Case("aten::conv1d", [(4, 9), (6, 4, 3), None, [1], "same"], 1296, "2*(6*9)*(4*3)", overload="padding"),
    Case("aten::conv2d", [(2, 4, 8, 8), (6, 4, 3, 3)], 31104, "2*(2*6*6*6)*(4*3*3)"),
    Case("aten::conv2d", [(2, 4, 8, 8), (6, 4, 3, 3), (6,), [2, 2], [1, 1]], 13824, "2*(2*6*4*4)*(4*3*3)"),
    Case("aten::conv2d", [(2, 4, 8, 8), (6, 4, 3, 3), None, [1, 1], [0, 0], [2, 2]], 13824, "2*(2*6*4*4)*(4*3*3)"),
    Case("aten::conv2d", [(2, 4, 8, 8), (6, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], 2], 15552, "2*(2*6*6*6)*(2*3*3)"),
    Case("aten::conv2d", [(2, 4, 8, 8), (8, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], 4], 10368, "2*(2*8*6*6)*(1*3*3)"),
    Case("aten::conv3d", [(1, 2, 5, 5, 5), (3, 2, 2, 2, 2)], 6144, "2*(1*3*4*4*4)*(2*2*2*2)"),
    Case("aten::conv_transpose1d", [(2, 4, 5), (4, 6, 3)], 1440, "2*(2*4*5)*(6*3)"),
    Case(
        "aten::conv_transpose2d",
        [(2, 4, 3, 3), (4, 3, 2, 2), None, [2, 2], [0, 0], [1, 1], 2],
        1728,
        "2*(2*4*3*3)*(3*2*2)",
        overload="input",
    ),
    Case(
        "aten::conv_transpose3d", [(1, 2, 3, 3, 3), (2, 3, 2, 2, 2)], 2592, "2*(1*2*3*3*3)*(3*2*2*2)", overload="input"
    ),
    Case(
        "aten::convolution",
        lambda: F.conv2d(torch.ones(4, 8, 8), torch.ones(6, 2, 3, 3), groups=2),
        7776,
        "2*(6*6*6)*(2*3*3)",
    ),
    Case(
        "aten::convolution",
        lambda: F.conv_transpose2d(torch.ones(1, 4, 3, 3), torch.ones(4, 3, 2, 2), groups=2),
        864,
        "2*(1*4*3*3)*(3*2*2)",
    ),
    Case(
        "aten::_convolution",
        [(1, 4, 8, 8), (6, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2, False, False, True, True],
        7776,
        "2*(1*6*6*6)*(2*3*3)",
    ),
    Case(
        "aten::_convolution_mode",
        [(1, 2, 5, 5), (3, 2, 3, 3), None, [1, 1], "same", [1, 1], 1],
        2700,
        "2*(1*3*5*5)*(2*3*3)",
    ),
    Case("aten::convolution_backward", lambda: backward((2, 4, 8, 8), (6, 4, 3, 3)), 62208, "2 * 2*(2*6*6*6)*(4*3*3)"),
    Case(
        "aten::convolution_backward",
        lambda: backward((2, 4, 8, 8), (6, 2, 3, 3), groups=2),
        31104,
        "2 * 2*(2*6*6*6)*(2*3*3)",
    ),
    Case(
        "aten::convolution_backward",
        lambda: backward((2, 4, 8, 8), (4, 1, 3, 3), groups=4),
        10368,
        "2 * 2*(2*4*6*6)*(1*3*3)",
    ),
    Case("aten::convolution_backward", lambda: backward((2, 4, 8, 8), (6, 4, 3, 3), "x"), 31104, "2*(2*6*6*6)*(4*3*3)"),
    Case(
        "aten::convolution_backward",
        lambda: backward((2, 4, 8, 8), (6, 4, 3, 3), "w", stride=2, padding=1),
        13824,
        "2*(2*6*4*4)*(4*3*3)",
    ),
    Case("aten::convolution_backward", transposed_backward, 3456, "2 * 2*(2*4*3*3)*(3*2*2)"),
    Case(
        "aten::mkldnn_convolution",
        [(1, 4, 8, 8), (6, 2, 3, 3), None, [0, 0], [1, 1], [1, 1], 2],
        7776,
        "2*(1*6*6*6)*(2*3*3)",
    ),
    Case("aten::_nnpack_spatial_convolution", [(1, 2, 5, 5), (3, 2, 3, 3), None, [0, 0]], 972, "2*(1*3*3*3)*(2*3*3)"),
    Case("aten::thnn_conv2d", [(1, 2, 4, 4), (3, 2, 3, 3), [3, 3]], 432, "2*(1*3*2*2)*(2*3*3)"),
    Case(
        "aten::_slow_conv2d_forward",
        [(1, 2, 4, 4), (3, 2, 3, 3), [3, 3], None, [1, 1], [0, 0]],
        432,
        "2*(1*3*2*2)*(2*3*3)",
    ),
    Case("aten::_slow_conv2d_backward", thnn_backward, 432, "2*(1*3*2*2)*(2*3*3)"),
    Case("aten::slow_conv3d", [(1, 2, 4, 4, 4), (3, 2, 3, 3, 3), [3, 3, 3]], 2592, "2*(1*3*2*2*2)*(2*3*3*3)"),
    Case(
        "aten::slow_conv3d_forward",
        [(1, 2, 4, 4, 4), (3, 2, 3, 3, 3), [3, 3, 3], None, [1, 1, 1], [0, 0, 0]],
        2592,
        "2*(1*3*2*2*2)*(2*3*3*3)",
    ),
    Case("aten::slow_conv_dilated2d", [(1, 2, 6, 6), (3, 2, 3, 3), [3, 3]], 1728, "2*(1*3*4*4)*(2*3*3)"),
    Case("aten::slow_conv_dilated3d", [(1, 2, 4, 4, 4), (3, 2, 3, 3, 3), [3, 3, 3]], 2592, "2*(1*3*2*2*2)*(2*3*3*3)"),
    Case("aten::slow_conv_transpose2d", [(1, 2, 4, 4), (2, 3, 3, 3), [3, 3]], 1728, "2*(1*2*4*4)*(3*3*3)"),
    Case("aten::slow_conv_transpose3d", [(1, 2, 3, 3, 3), (2, 3, 2, 2, 2), [2, 2, 2]], 2592, "2*(1*2*3*3*3)*(3*2*2*2)"),
    Case("aten::conv_tbc", [(5, 2, 3), (3, 3, 4), (4,), 1], 720, "2*(5*2*4)*(3*3)"),
    Case("torchvision::deform_conv2d", lambda: deformable("cpu"), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("torchvision::deform_conv2d", lambda: deformable("meta"), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case(
        "torchvision::_deform_conv2d_backward",
        lambda: deformable("cpu", True, True, True),
        15552,
        "2 * 2*(1*6*6*6)*(2*3*3)",
    ),
    Case(
        "torchvision::_deform_conv2d_backward",
        lambda: deformable("meta", True, True, True),
        15552,
        "2 * 2*(1*6*6*6)*(2*3*3)",
    ),
    Case("torchvision::_deform_conv2d_backward", lambda: deformable("cpu", offset=True), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("torchvision::_deform_conv2d_backward", lambda: deformable("cpu", weight=True), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("mkldnn::_convolution_pointwise", lambda: pointwise("unary"), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("mkldnn::_convolution_pointwise", lambda: pointwise("binary"), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("mkldnn::_convolution_transpose_pointwise", lambda: pointwise("transposed"), 13824, "2*(1*4*8*8)*(3*3*3)"),
    Case("onednn::qconv_pointwise", lambda: qconv("qconv_pointwise", 2), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("onednn::qconv1d_pointwise", lambda: qconv("qconv1d_pointwise", 1), 432, "2*(1*6*6)*(2*3)"),
    Case("onednn::qconv2d_pointwise", lambda: qconv("qconv2d_pointwise", 2), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("onednn::qconv3d_pointwise", lambda: qconv("qconv3d_pointwise", 3), 139968, "2*(1*6*6*6*6)*(2*3*3*3)"),
    on_shapes(
        "aten::convolution_overrideable",
        [(1, 4, 8, 8), (6, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2],
        7776,
        "2*(1*6*6*6)*(2*3*3)",
        out=(1, 6, 6, 6),
    ),
    on_shapes(
        "aten::convolution_backward_overrideable",
        [(1, 6, 6, 6), (1, 4, 8, 8), (6, 2, 3, 3), [1, 1], [0, 0], [1, 1], False, [0, 0], 2, [True, True, True]],
        15552,
        "2 * 2*(1*6*6*6)*(2*3*3)",
    ),
    *(
        on_shapes(f"aten::{name}", [(1, 4, 8, 8), (6, 2, 3, 3)], 7776, "2*(1*6*6*6)*(2*3*3)", out=(1, 6, 6, 6))
        for name in (
            "cudnn_convolution",
            "cudnn_convolution_relu",
            "cudnn_convolution_add_relu",
            "miopen_convolution",
            "miopen_convolution_relu",
            "miopen_convolution_add_relu",
            "_mps_convolution",
        )
    ),
    *(
        on_shapes(f"aten::{name}", [(1, 4, 8, 8), (4, 1, 3, 3)], 2592, "2*(1*4*6*6)*(1*3*3)", out=(1, 4, 6, 6))
        for name in ("_conv_depthwise2d", "miopen_depthwise_convolution")
    ),
    on_shapes(
        "aten::conv_depthwise3d",
        [(1, 2, 5, 5, 5), (2, 1, 3, 3, 3)],
        2916,
        "2*(1*2*3*3*3)*(1*3*3*3)",
        out=(1, 2, 3, 3, 3),
    ),
    *(
        on_shapes(f"aten::{name}", [(1, 4, 8, 8), (4, 3, 2, 2)], 6144, "2*(1*4*8*8)*(3*2*2)", out=(1, 6, 9, 9))
        for name in ("cudnn_convolution_transpose", "miopen_convolution_transpose", "_mps_convolution_transpose")
    ),
    on_shapes(
        "aten::mps_convolution_backward",
        [(1, 4, 8, 8), (1, 6, 6, 6), (6, 2, 3, 3), [0, 0], [1, 1], [1, 1], 2, [True, True, False]],
        15552,
        "2 * 2*(1*6*6*6)*(2*3*3)",
    ),
    on_shapes(
        "aten::mps_convolution_transpose_backward",
        [(1, 4, 8, 8), (1, 6, 9, 9), (4, 3, 2, 2), [0, 0], [0, 0], [1, 1], [1, 1], 2, [True, False]],
        6144,
        "2*(1*4*8*8)*(3*2*2)",
    ),
]
