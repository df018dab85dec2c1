"""Cases of packed, quantised weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import quantize_dynamic

from case import Case, on_meta, on_shapes


def quantized(*shape: int) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.quint8)


def module(kind: type[nn.Module], sizes: tuple[int, ...], x: tuple[int, ...], **options: Any) -> Callable[[], Any]:
    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = kind(*sizes, **options)
        return layer(quantized(*x))

    return run


def operator(name: str, kind: type[nn.Module], sizes: tuple[int, ...], x: tuple[int, ...], *rest: Any) -> Any:
    """torch.ops.quantized.NAME(x, tensors of the shapes in rest, packed weight of a module)."""

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed = kind(*sizes)._packed_params
        packed = getattr(packed, "_packed_params", packed)
        op, _, overload = name.partition(".")
        plain = op.endswith("dynamic")
        return getattr(getattr(torch.ops.quantized, op), overload or "default")(
            torch.ones(x) if plain else quantized(*x),
            *(quantized(*shape) for shape in rest),
            packed,
            *([] if plain else [1.0, 0]),
        )

    return run


def packed_linear(name: str, *rest: Any) -> Callable[[], Any]:
    def run() -> Any:
        weight = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        x = torch.ones(2, 4) if "dynamic" in name else quantized(2, 4)
        return getattr(torch.ops.quantized, name)(x, packed, *rest)

    return run


def half_linear(name: str) -> Callable[[], Any]:
    def run() -> Any:
        packed = torch.ops.quantized.linear_prepack_fp16(torch.ones(3, 4), None)
        return getattr(torch.ops.quantized, name)(torch.ones(2, 4), packed)

    return run


def dynamic(kind: type[nn.Module], x: tuple[int, ...] | Any, **options: Any) -> Callable[[], Any]:
    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = quantize_dynamic(nn.ModuleList([kind(4, 3, **options)]), {kind}, dtype=torch.qint8)[0]
        return model(torch.ones(x) if isinstance(x, tuple) else x())

    return run


def packed_sequence() -> Any:
    return nn.utils.rnn.pack_sequence([torch.ones(3, 4), torch.ones(2, 4)])


def int4_for_cpu() -> Any:
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.ones(64, 64, dtype=torch.int32), 2)
    x, scales = torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(2, 64, 2, dtype=torch.bfloat16)
    return torch._weight_int4pack_mm_for_cpu(x, packed, 32, scales)


def dynamic_4bit() -> Any:
    pack = torch.ops.aten._dyn_quant_pack_4bit_weight
    packed = pack(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 2), None, 32, 64, 32)
    return torch.ops.aten._dyn_quant_matmul_4bit(torch.ones(3, 64), packed, 32, 64, 32)


def onednn_qlinear() -> Any:
    packed = torch.ops.onednn.qlinear_prepack(torch.ones(5, 8, dtype=torch.int8), [2, 8])
    x, scales, points = torch.ones(2, 8, dtype=torch.uint8), torch.ones(5), torch.zeros(5, dtype=torch.long)
    rest = [None, 1.0, 0, torch.float32, "none", [], ""]
    return torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, scales, points, *rest)


def on_engine(engine: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with another quantised engine: each implements operators of its own."""

    def run() -> Any:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            return call()
        finally:
            torch.backends.quantized.engine = before

    return run


def input_q_dq(name: str) -> Callable[[], Any]:
    def run() -> Any:
        weight = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        return getattr(torch.ops.quantized, name)(torch.ones(2, 4), 0.1, 0, packed)

    return run


QUANTIZED = torch.ops._quantized


def prepacked() -> Any:
    return QUANTIZED.linear_prepack(torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), None)


def wrapped_half() -> Any:
    packed = QUANTIZED.wrapped_fbgemm_pack_gemm_matrix_fp16(torch.ones(3, 4))
    return QUANTIZED.wrapped_fbgemm_linear_fp16_weight(torch.ones(2, 4), packed, torch.ones(3), 3)


@torch.inference_mode()
def wrapped_prepacked() -> Any:
    scale, zero = torch.tensor(1.0), torch.tensor(0)
    packed = torch.ops.aten._wrapped_linear_prepack(torch.ones(3, 4), scale, zero, torch.ones(3))
    return torch.ops.aten._wrapped_quantized_linear_prepacked(torch.ones(2, 4), scale, zero, packed, scale, zero, 3)


@torch.inference_mode()
def fbgemm_half(name: str) -> Any:
    packed = torch.fbgemm_pack_gemm_matrix_fp16(torch.ones(3, 4))
    return getattr(torch, name)(torch.ones(2, 4), packed, torch.ones(3))


@torch.inference_mode()
def fbgemm_int8(name: str) -> Any:
    weight, offsets, scale, zero = torch.fbgemm_linear_quantize_weight(torch.ones(3, 4))
    packed = torch.fbgemm_pack_quantized_matrix(weight)
    return getattr(torch, name)(torch.ones(2, 4), weight, packed, offsets, scale, zero, torch.ones(3))


def onednn_half(name: str) -> Any:
    packed = torch.ops.onednn.linear_prepack_fp16(torch.ones(3, 4), None)
    return getattr(torch.ops.onednn, name)(torch.ones(2, 4), packed, None)


def conv_of(name: str, dims: int) -> Any:
    """A prepacked convolution of 2 groups: (1, 4, 8 ...) with a kernel of 3 to 6 channels."""
    ones, zeros, transposed = [1] * dims, [0] * dims, "transpose" in name
    shape = (4, 3) if transposed else (6, 2)
    weight = torch.quantize_per_tensor(torch.ones(*shape, *([3] * dims)), 0.1, 0, torch.qint8)
    prepack = getattr(QUANTIZED, f"{name.removesuffix('_relu')}_prepack")
    packed = prepack(weight, None, ones, zeros, *([zeros] if transposed else []), ones, 2)
    return getattr(QUANTIZED, name)(quantized(1, 4, *([8] * dims)), packed, 1.0, 0)


@torch.inference_mode()
def fbgemm_cell(kind: str, gates: int) -> Any:
    def quantize(*shape: int) -> tuple[Any, ...]:
        weight, *rest = torch.fbgemm_linear_quantize_weight(torch.ones(shape))
        return weight, torch.fbgemm_pack_quantized_matrix(weight), *rest

    (w, p, c, s, z), (w2, p2, c2, s2, z2) = quantize(gates * 3, 4), quantize(gates * 3, 3)
    state = [torch.ones(2, 3)] * 2 if kind == "lstm" else torch.ones(2, 3)
    bias = torch.ones(gates * 3)
    cell = getattr(torch.ops.aten, f"quantized_{kind}_cell")
    return cell(torch.ones(2, 4), state, w, w2, bias, bias, p, p2, c, c2, s, s2, z, z2)


SCALE = [(), ()]
GROUP = torch.empty(1, dtype=torch.int64, device="meta")
INT8 = torch.ones(16, 32, dtype=torch.int8)
INT4 = torch.empty(2, 4, 32, 2, dtype=torch.int32)

LINEAR = [
    Case("aten::_weight_int8pack_mm", [(2, 32), INT8, (16,)], 2048, "2*2*32*16", dtype="bfloat16"),
    Case("aten::_weight_int4pack_mm_for_cpu", int4_for_cpu, 16384, "2*2*64*64"),
    Case("aten::_dyn_quant_matmul_4bit", dynamic_4bit, 12288, "2*3*64*32"),
    Case("onednn::qlinear_pointwise", onednn_qlinear, 160, "2*2*8*5"),
    Case("quantized::linear", module(nnq.Linear, (8, 3), (2, 4, 8)), 384, "2*2*4*8*3"),
    Case("quantized::linear_relu", packed_linear("linear_relu", 1.0, 0), 48, "2*2*4*3"),
    Case("quantized::linear_dynamic", packed_linear("linear_dynamic"), 48, "2*2*4*3"),
    Case("quantized::linear_relu_dynamic", packed_linear("linear_relu_dynamic"), 48, "2*2*4*3"),
    Case("quantized::linear_dynamic_fp16", half_linear("linear_dynamic_fp16"), 48, "2*2*4*3"),
    Case("quantized::linear_relu_dynamic_fp16", half_linear("linear_relu_dynamic_fp16"), 48, "2*2*4*3"),
    Case(
        "quantized::linear_leaky_relu",
        on_engine("onednn", packed_linear("linear_leaky_relu", 1.0, 0, 0.1)),
        48,
        "2*2*4*3",
    ),
    Case("quantized::linear_tanh", on_engine("onednn", packed_linear("linear_tanh", 1.0, 0)), 48, "2*2*4*3"),
    *(
        Case(f"quantized::{name}", on_engine("fbgemm", input_q_dq(name)), 48, "2*2*4*3")
        for name in (
            "linear_with_input_q_dq_qweight_dq_output_fp32",
            "linear_with_input_q_dq_qweight_dq_relu_output_fp32",
        )
    ),
    Case("quantized::linear_dynamic_fp16_unpacked_weight", [(2, 4), (3, 4), (3,)], 48, "2*2*4*3"),
    on_meta(
        "quantized::int4mm_packed_weight_cpu",
        [(2, 64), torch.empty(64, 32, dtype=torch.uint8, device="meta"), GROUP, (2, 64, 2)],
        16384,
        "2*2*64*64",
        dtype="bfloat16",
    ),
    Case("_quantized::linear", lambda: QUANTIZED.linear(quantized(2, 4), prepacked(), 1.0, 0), 48, "2*2*4*3"),
    Case("_quantized::linear_dynamic", lambda: QUANTIZED.linear_dynamic(torch.ones(2, 4), prepacked()), 48, "2*2*4*3"),
    Case("_quantized::wrapped_fbgemm_linear_fp16_weight", wrapped_half, 48, "2*2*4*3"),
    on_meta("_quantized::wrapped_quantized_linear", [(2, 4), *SCALE, (3, 4), *SCALE, (3,), *SCALE, 3], 48, "2*2*4*3"),
    on_meta(
        "_quantized::_wrapped_quantized_linear_prepacked",
        [(2, 4), *SCALE, (3, 4), *SCALE, 3],
        48,
        "2*2*4*3",
    ),
    Case("aten::_wrapped_quantized_linear_prepacked", wrapped_prepacked, 48, "2*2*4*3"),
    Case("aten::fbgemm_linear_fp16_weight", lambda: fbgemm_half("fbgemm_linear_fp16_weight"), 48, "2*2*4*3"),
    Case(
        "aten::fbgemm_linear_fp16_weight_fp32_activation",
        lambda: fbgemm_half("fbgemm_linear_fp16_weight_fp32_activation"),
        48,
        "2*2*4*3",
    ),
    Case("aten::fbgemm_linear_int8_weight", lambda: fbgemm_int8("fbgemm_linear_int8_weight"), 48, "2*2*4*3"),
    Case(
        "aten::fbgemm_linear_int8_weight_fp32_activation",
        lambda: fbgemm_int8("fbgemm_linear_int8_weight_fp32_activation"),
        48,
        "2*2*4*3",
    ),
    *(
        Case(f"onednn::{name}", lambda name=name: onednn_half(name), 48, "2*2*4*3")
        for name in ("linear_dynamic_fp16", "linear_relu_dynamic_fp16")
    ),
    on_shapes("aten::_mixed_dtypes_linear", [(2, 4), (3, 4), (3,)], 48, "2*2*4*3", out=(2, 3)),
    on_shapes("aten::_weight_int4pack_mm", [(2, 64), INT4, 32, (2, 16, 2)], 4096, "2*2*64*16", out=(2, 16)),
    on_shapes(
        "aten::_weight_int4pack_mm_with_scales_and_zeros",
        [(2, 64), INT4, 32, (2, 16), (2, 16)],
        4096,
        "2*2*64*16",
        out=(2, 16),
    ),
]


class Packed:
    """Stands for a packed weight object: it gives its weight back."""

    def __init__(self, *shape: int) -> None:
        self.weight = torch.empty(shape, device="meta")

    def unpack(self) -> tuple[torch.Tensor, None]:
        return self.weight, None


CT1D = operator("conv_transpose1d_dynamic", nnq.ConvTranspose1d, (4, 6, 3), (1, 4, 8))
CT2D = operator("conv_transpose2d_dynamic", nnq.ConvTranspose2d, (4, 6, 3), (1, 4, 8, 8))
CT3D = operator("conv_transpose3d_dynamic", nnq.ConvTranspose3d, (4, 6, 2), (1, 4, 3, 3, 3))

CONVOLUTIONS = [
    Case("quantized::conv2d", module(nnq.Conv2d, (4, 6, 3), (1, 4, 8, 8), groups=2), 7776, "2*(1*6*6*6)*(2*3*3)"),
    Case("quantized::conv1d", module(nnq.Conv1d, (4, 6, 3), (1, 4, 8)), 864, "2*(1*6*6)*(4*3)"),
    Case("quantized::conv3d", module(nnq.Conv3d, (4, 6, 3), (1, 4, 5, 5, 5)), 34992, "2*(1*6*3*3*3)*(4*3*3*3)"),
    Case("quantized::conv_transpose1d", module(nnq.ConvTranspose1d, (4, 6, 3), (1, 4, 8)), 1152, "2*(1*4*8)*(6*3)"),
    Case(
        "quantized::conv_transpose2d",
        module(nnq.ConvTranspose2d, (4, 6, 3), (1, 4, 8, 8)),
        27648,
        "2*(1*4*8*8)*(6*3*3)",
    ),
    Case("quantized::conv1d_relu", operator("conv1d_relu", nnq.Conv1d, (4, 6, 3), (1, 4, 8)), 864, "2*(1*6*6)*(4*3)"),
    Case(
        "quantized::conv2d_relu",
        operator("conv2d_relu.new", nnq.Conv2d, (4, 6, 3), (1, 4, 8, 8)),
        15552,
        "2*(1*6*6*6)*(4*3*3)",
    ),
    Case(
        "quantized::conv3d_relu",
        operator("conv3d_relu.new", nnq.Conv3d, (4, 6, 3), (1, 4, 5, 5, 5)),
        34992,
        "2*(1*6*3*3*3)*(4*3*3*3)",
    ),
    Case(
        "quantized::conv1d_dynamic",
        operator("conv1d_dynamic", nnq.Conv1d, (4, 6, 3), (1, 4, 8)),
        864,
        "2*(1*6*6)*(4*3)",
    ),
    Case(
        "quantized::conv2d_dynamic",
        operator("conv2d_dynamic", nnq.Conv2d, (4, 6, 3), (1, 4, 8, 8)),
        15552,
        "2*(1*6*6*6)*(4*3*3)",
    ),
    Case(
        "quantized::conv3d_dynamic",
        operator("conv3d_dynamic", nnq.Conv3d, (4, 6, 3), (1, 4, 5, 5, 5)),
        34992,
        "2*(1*6*3*3*3)*(4*3*3*3)",
    ),
    Case(
        "quantized::conv_transpose1d_dynamic",
        operator("conv_transpose1d_dynamic", nnq.ConvTranspose1d, (4, 6, 3), (1, 4, 8)),
        1152,
        "2*(1*4*8)*(6*3)",
    ),
    Case(
        "quantized::conv_transpose2d_dynamic",
        operator("conv_transpose2d_dynamic", nnq.ConvTranspose2d, (4, 6, 3), (1, 4, 8, 8)),
        27648,
        "2*(1*4*8*8)*(6*3*3)",
    ),
    Case(
        "quantized::conv_transpose3d",
        module(nnq.ConvTranspose3d, (4, 6, 2), (1, 4, 3, 3, 3)),
        10368,
        "2*(1*4*3*3*3)*(6*2*2*2)",
    ),
    Case(
        "quantized::conv_transpose3d_dynamic",
        operator("conv_transpose3d_dynamic", nnq.ConvTranspose3d, (4, 6, 2), (1, 4, 3, 3, 3)),
        10368,
        "2*(1*4*3*3*3)*(6*2*2*2)",
    ),
    *(
        Case(
            f"quantized::{name}",
            on_engine("onednn", operator(name, nnq.Conv2d, (4, 6, 3), (1, 4, 8, 8), (1, 6, 6, 6))),
            15552,
            "2*(1*6*6*6)*(4*3*3)",
        )
        for name in ("conv2d_add", "conv2d_add_relu")
    ),
    *(
        Case(f"_quantized::{name}", lambda name=name: conv_of(name, 2), 7776, "2*(1*6*6*6)*(2*3*3)")
        for name in ("conv2d", "conv2d_relu")
    ),
    Case("_quantized::conv_transpose1d", lambda: conv_of("conv_transpose1d", 1), 576, "2*(1*4*8)*(3*3)"),
    Case("_quantized::conv_transpose2d", lambda: conv_of("conv_transpose2d", 2), 13824, "2*(1*4*8*8)*(3*3*3)"),
    *(
        on_shapes(name, [(1, 4, 5, 5, 5), Packed(6, 2, 3, 3, 3)], 17496, "2*(1*6*3*3*3)*(2*3*3*3)", out=(1, 6, 3, 3, 3))
        for name in ("_quantized::conv3d", "_quantized::conv3d_relu")
    ),
]

RECURRENT = [
    Case("aten::quantized_lstm", dynamic(nn.LSTM, (5, 2, 4)), 1680, "2*10*12*(4 + 3)"),
    Case(
        "aten::quantized_lstm",
        dynamic(nn.LSTM, (5, 2, 4), num_layers=2, bidirectional=True),
        7680,
        "2*(2*10*12*(4 + 3)) + 2*(2*10*12*(6 + 3))",
    ),
    Case("aten::quantized_lstm", dynamic(nn.LSTM, packed_sequence), 840, "2*5*12*(4 + 3)"),
    Case("aten::quantized_gru", dynamic(nn.GRU, (5, 2, 4)), 1260, "2*10*9*(4 + 3)"),
    Case("aten::quantized_gru", dynamic(nn.GRU, packed_sequence), 630, "2*5*9*(4 + 3)"),
    Case("quantized::quantized_lstm_cell_dynamic", dynamic(nn.LSTMCell, (2, 4)), 336, "2*2*12*(4 + 3)"),
    Case("quantized::quantized_gru_cell_dynamic", dynamic(nn.GRUCell, (2, 4)), 252, "2*2*9*(4 + 3)"),
    Case("quantized::quantized_rnn_tanh_cell_dynamic", dynamic(nn.RNNCell, (2, 4)), 84, "2*2*3*(4 + 3)"),
    Case(
        "quantized::quantized_rnn_relu_cell_dynamic",
        dynamic(nn.RNNCell, (2, 4), nonlinearity="relu"),
        84,
        "2*2*3*(4 + 3)",
    ),
    Case("aten::quantized_lstm_cell", lambda: fbgemm_cell("lstm", 4), 336, "2*2*12*(4 + 3)"),
    Case("aten::quantized_gru_cell", lambda: fbgemm_cell("gru", 3), 252, "2*2*9*(4 + 3)"),
    Case("aten::quantized_rnn_tanh_cell", lambda: fbgemm_cell("rnn_tanh", 1), 84, "2*2*3*(4 + 3)"),
    Case("aten::quantized_rnn_relu_cell", lambda: fbgemm_cell("rnn_relu", 1), 84, "2*2*3*(4 + 3)"),
]

# What stands in for the kernels of packages that quantise.
STANDING_IN = [
    on_shapes("flopprof::quantised_linear", [(2, 4), (3, 4), torch.float32], 48, "2*2*3*4", out=(2, 3)),
    on_shapes("flopprof::quantised_grouped_mm", [(6, 4), (3, 4, 5), (3,), torch.float32], 240, "2*6*4*5", out=(6, 5)),
]

CASES = [*LINEAR, *CONVOLUTIONS, *RECURRENT, *STANDING_IN]
