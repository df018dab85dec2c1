"""Cases of packed, quantised weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import quantize_dynamic

from case import Case, on_shapes


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
    """torch.ops.quantized.NAME(x, packed weight of a module, *rest)."""

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed = kind(*sizes)._packed_params
        packed = getattr(packed, "_packed_params", packed)
        op, _, overload = name.partition(".")
        plain = op.endswith("dynamic")
        return getattr(getattr(torch.ops.quantized, op), overload or "default")(
            torch.ones(x) if plain else quantized(*x), *rest, packed, *([] if plain else [1.0, 0])
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
    *(
        on_shapes(name, [(2, 4), None], 48, "2*2*4*3", out=(2, 3))
        for name in (
            "quantized::linear_leaky_relu",
            "quantized::linear_tanh",
            "quantized::linear_with_input_q_dq_qweight_dq_output_fp32",
            "quantized::linear_with_input_q_dq_qweight_dq_relu_output_fp32",
            "quantized::int4mm_packed_weight_cpu",
            "quantized::linear_dynamic_fp16_unpacked_weight",
            "_quantized::linear",
            "_quantized::linear_dynamic",
            "_quantized::wrapped_fbgemm_linear_fp16_weight",
            "_quantized::wrapped_quantized_linear",
            "_quantized::_wrapped_quantized_linear_prepacked",
            "aten::_wrapped_quantized_linear_prepacked",
            "aten::fbgemm_linear_fp16_weight",
            "aten::fbgemm_linear_fp16_weight_fp32_activation",
            "aten::fbgemm_linear_int8_weight",
            "aten::fbgemm_linear_int8_weight_fp32_activation",
            "aten::_mixed_dtypes_linear",
            "onednn::linear_dynamic_fp16",
            "onednn::linear_relu_dynamic_fp16",
        )
    ),
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
    *(
        on_shapes(name, [(1, 4, 8, 8), Packed(6, 2, 3, 3)], 7776, "2*(1*6*6*6)*(2*3*3)", out=(1, 6, 6, 6))
        for name in ("_quantized::conv2d", "_quantized::conv2d_relu")
    ),
    *(
        on_shapes(name, [(1, 4, 5, 5, 5), Packed(6, 2, 3, 3, 3)], 17496, "2*(1*6*3*3*3)*(2*3*3*3)", out=(1, 6, 3, 3, 3))
        for name in ("_quantized::conv3d", "_quantized::conv3d_relu")
    ),
    *(
        on_shapes(name, [(1, 4, 8, 8), (1, 6, 6, 6), Packed(6, 2, 3, 3)], 7776, "2*(1*6*6*6)*(2*3*3)", out=(1, 6, 6, 6))
        for name in ("quantized::conv2d_add", "quantized::conv2d_add_relu")
    ),
    *(
        on_shapes(name, [(1, 4, 8), Packed(4, 6, 1, 3)], 1152, "2*(1*4*8)*(6*3)", out=(1, 6, 10))
        for name in ("_quantized::conv_transpose1d", "quantized::conv_transpose1d_dynamic")
    ),
    *(
        on_shapes(name, [(1, 4, 8, 8), Packed(4, 6, 3, 3)], 27648, "2*(1*4*8*8)*(6*3*3)", out=(1, 6, 10, 10))
        for name in ("_quantized::conv_transpose2d", "quantized::conv_transpose2d_dynamic")
    ),
    *(
        on_shapes(name, [(1, 4, 3, 3, 3), Packed(4, 6, 2, 2, 2)], 10368, "2*(1*4*3*3*3)*(6*2*2*2)", out=(1, 6, 4, 4, 4))
        for name in ("quantized::conv_transpose3d", "quantized::conv_transpose3d_dynamic")
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
    on_shapes("aten::quantized_lstm_cell", [(2, 4), [(2, 3), (2, 3)]], 336, "2*2*12*(4 + 3)"),
    on_shapes("aten::quantized_gru_cell", [(2, 4), (2, 3)], 252, "2*2*9*(4 + 3)"),
    on_shapes("aten::quantized_rnn_tanh_cell", [(2, 4), (2, 3)], 84, "2*2*3*(4 + 3)"),
    on_shapes("aten::quantized_rnn_relu_cell", [(2, 4), (2, 3)], 84, "2*2*3*(4 + 3)"),
]

CASES = [*LINEAR, *CONVOLUTIONS, *RECURRENT]
