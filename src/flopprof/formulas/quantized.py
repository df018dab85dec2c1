"""Products with packed, quantised weights: the same multiply-adds in another number format.

A packed weight need not tell its shape: a linear layer is counted from its input and its result, a convolution asks
the packed object for its weight.
"""

from __future__ import annotations

from typing import Any

from flopprof.formulas.convolution import conv_flops
from flopprof.formulas.operand import Tensor
from flopprof.formulas.registry import LengthsUnknown, formula, product


@formula(
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_weight_int4pack_mm_with_scales_and_zeros",
    "aten::_dyn_quant_matmul_4bit",
    "aten::_mixed_dtypes_linear",
    "aten::fbgemm_linear_fp16_weight",
    "aten::fbgemm_linear_fp16_weight_fp32_activation",
    "aten::fbgemm_linear_int8_weight",
    "aten::fbgemm_linear_int8_weight_fp32_activation",
    "quantized::int4mm_packed_weight_cpu",
    "quantized::linear_dynamic_fp16_unpacked_weight",
    "onednn::linear_dynamic_fp16",
    "onednn::linear_relu_dynamic_fp16",
    "flopprof::quantised_linear",
)
def packed_linear(x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ a packed (n, k)^T: 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


@formula("onednn::qlinear_pointwise", "_quantized::wrapped_quantized_linear", operands=(0, 3))
def qlinear(x: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) @ a packed (n, k)^T: 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


@formula(
    "quantized::linear",
    "quantized::linear_relu",
    "quantized::linear_leaky_relu",
    "quantized::linear_tanh",
    "quantized::linear_dynamic",
    "quantized::linear_relu_dynamic",
    "quantized::linear_dynamic_fp16",
    "quantized::linear_relu_dynamic_fp16",
    "quantized::linear_with_input_q_dq_qweight_dq_output_fp32",
    "quantized::linear_with_input_q_dq_qweight_dq_relu_output_fp32",
    "_quantized::linear",
    "_quantized::linear_dynamic",
    "_quantized::wrapped_fbgemm_linear_fp16_weight",
    "_quantized::_wrapped_quantized_linear_prepacked",
    "aten::_wrapped_quantized_linear_prepacked",
    operands=(0,),
)
def quantized_linear(x: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """(..., k) with a packed weight object (n, k): 2 k for every element of the result."""
    return 2 * product(out.shape) * x.shape[-1]


def _unpacked(packed: Any) -> Any:
    try:
        return packed.unpack()[0]
    except Exception as error:
        # Each packed class raises its own error where its engine is missing; a fake one cannot be unpacked.
        raise LengthsUnknown(f"the packed weight cannot be read: {type(error).__name__}") from error


@formula(
    "quantized::conv1d",
    "quantized::conv1d_relu",
    "quantized::conv1d_dynamic",
    "quantized::conv2d",
    "quantized::conv2d_relu",
    "quantized::conv2d_dynamic",
    "quantized::conv3d",
    "quantized::conv3d_relu",
    "quantized::conv3d_dynamic",
    "_quantized::conv2d",
    "_quantized::conv2d_relu",
    "_quantized::conv3d",
    "_quantized::conv3d_relu",
    operands=(0,),
)
def quantized_conv(x: Tensor, packed: Any, *_: Any, out: Any, **__: Any) -> int:
    """2 out c/groups kernel."""
    return conv_flops(x, _unpacked(packed), out, transposed=False)


@formula("quantized::conv2d_add", "quantized::conv2d_add_relu", operands=(0,))
def quantized_conv_add(x: Tensor, addend: Any, packed: Any, *_: Any, out: Any, **__: Any) -> int:
    """2 out c/groups kernel; the addition is elementwise."""
    return conv_flops(x, _unpacked(packed), out, transposed=False)


@formula(
    "quantized::conv_transpose1d",
    "quantized::conv_transpose1d_dynamic",
    "quantized::conv_transpose2d",
    "quantized::conv_transpose2d_dynamic",
    "quantized::conv_transpose3d",
    "quantized::conv_transpose3d_dynamic",
    "_quantized::conv_transpose1d",
    "_quantized::conv_transpose2d",
    operands=(0,),
)
def quantized_conv_transpose(x: Tensor, packed: Any, *_: Any, out: Any, **__: Any) -> int:
    """2 in n/groups kernel."""
    return conv_flops(x, _unpacked(packed), out, transposed=True)


def stack_flops(x: Tensor, hidden: int, gates: int, layers: int, directions: int) -> int:
    """Layers of gates * hidden rows over (x, hidden), without projection: 2 rows gates hidden (inputs + hidden)."""
    inputs = x.shape[-1] + (layers - 1) * directions * hidden
    return 2 * product(x.shape[:-1]) * directions * gates * hidden * (inputs + layers * hidden)


@formula("aten::quantized_lstm", operands=(0,))
def quantized_lstm(x: Tensor, *args: Any, out: Any, **_: Any) -> int:
    """(x, state, weights, biases, layers, dropout, train, bidirectional ...), packed with batch_sizes after x."""
    state, _weights, _biases, layers, _dropout, _train, bidirectional = args[not isinstance(args[0], (list, tuple)) :][
        :7
    ]
    return stack_flops(x, state[0].shape[-1], 4, layers, 1 + bool(bidirectional))


@formula("aten::quantized_gru", operands=(0,))
def quantized_gru(x: Tensor, *args: Any, out: Any, **_: Any) -> int:
    """(x, state, weights, biases, layers, dropout, train, bidirectional ...), packed with batch_sizes after x."""
    state, _weights, _biases, layers, _dropout, _train, bidirectional = args[not isinstance(args[1], (list, tuple)) :][
        :7
    ]
    return stack_flops(x, state.shape[-1], 3, layers, 1 + bool(bidirectional))


@formula("aten::quantized_lstm_cell", "quantized::quantized_lstm_cell_dynamic", operands=(0, 1))
def quantized_lstm_cell(x: Tensor, state: Any, *_: Any, out: Any) -> int:
    """One step of 4 gates."""
    return stack_flops(x, state[0].shape[-1], 4, 1, 1)


@formula("aten::quantized_gru_cell", "quantized::quantized_gru_cell_dynamic", operands=(0, 1))
def quantized_gru_cell(x: Tensor, state: Any, *_: Any, out: Any) -> int:
    """One step of 3 gates."""
    return stack_flops(x, state.shape[-1], 3, 1, 1)


@formula(
    "aten::quantized_rnn_tanh_cell",
    "aten::quantized_rnn_relu_cell",
    "quantized::quantized_rnn_tanh_cell_dynamic",
    "quantized::quantized_rnn_relu_cell_dynamic",
    operands=(0, 1),
)
def quantized_rnn_cell(x: Tensor, state: Any, *_: Any, out: Any) -> int:
    """One step without gates."""
    return stack_flops(x, state.shape[-1], 1, 1, 1)
