"""Cases of recurrent networks: (sequence, step) rows times the elements of each weight matrix.

Inputs have 3 features and states 4, unless a case says otherwise: an LSTM's weights are (16, 3) and (16, 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from case import Case, on_meta, on_shapes

LSTM = [(16, 3), (16, 4), (16,), (16,)]
STATE = [(1, 2, 4), (1, 2, 4)]
FLAGS = [True, 1, 0.0, False, False]  # biases, layers, dropout, train, bidirectional
SIZES = torch.tensor([2, 2, 1])  # two sequences packed: 3 and 2 steps


def lstm(x: bool = False, hx: bool = False, **options: Any) -> None:
    model = nn.LSTM(3, 4, **options)
    states = torch.ones(1, 2, 4, requires_grad=hx), torch.ones(1, 2, 4)
    result, _ = model(torch.ones(5, 2, 3, requires_grad=x), states)
    result.sum().backward()


def frozen_lstm() -> None:
    model = nn.LSTM(3, 4).requires_grad_(False)
    model(torch.ones(5, 2, 3, requires_grad=True))[0].sum().backward()


def cudnn_backward(mode: int, *mask: bool, batch_sizes: tuple[int, ...] = ()) -> list[Any]:
    """LSTM of 2 layers in 2 directions, packed or 5 steps of 2 sequences."""
    weights = [(16, 3), (16, 4), (16,), (16,)] * 2 + [(16, 8), (16, 4), (16,), (16,)] * 2
    x, hx = ((sum(batch_sizes), 3) if batch_sizes else (5, 2, 3)), (4, 2, 4)
    grads = [None, None, None]
    options = [mode, 4, 0, 2, False, 0.0, True, True, list(batch_sizes), None]
    return [x, weights, 4, (1,), hx, hx, (5, 2, 8), *grads, *options, (1,), list(mask)]


def miopen_backward(*mask: bool) -> list[Any]:
    args = cudnn_backward(2, *mask)
    return args[:12] + args[13:]


# Rows of 5 steps of 2 sequences: 10; the first step has 2. Forward of one layer and direction: 10*(16*3 + 16*4).
CASES = [
    Case("aten::lstm", [(5, 2, 3), STATE, LSTM, *FLAGS, False], 2240, "2*10*(16*3 + 16*4)", overload="input"),
    Case("aten::lstm", [(2, 5, 3), STATE, LSTM, *FLAGS, True], 2240, "2*10*(16*3 + 16*4)", overload="input"),
    Case("aten::lstm", [(5, 3), SIZES, STATE, LSTM, *FLAGS], 1120, "2*5*(16*3 + 16*4)", overload="data"),
    Case(
        "aten::gru",
        [(5, 2, 3), (1, 2, 4), [(12, 3), (12, 4), (12,), (12,)], *FLAGS, False],
        1680,
        "2*10*(12*3 + 12*4)",
        overload="input",
    ),
    Case(
        "aten::gru",
        [(5, 3), SIZES, (1, 2, 4), [(12, 3), (12, 4), (12,), (12,)], *FLAGS],
        840,
        "2*5*(12*3 + 12*4)",
        overload="data",
    ),
    Case(
        "aten::rnn_tanh",
        [(5, 2, 3), (1, 2, 4), [(4, 3), (4, 4), (4,), (4,)], *FLAGS, False],
        560,
        "2*10*(4*3 + 4*4)",
        overload="input",
    ),
    Case(
        "aten::rnn_relu",
        [(5, 2, 3), (1, 2, 4), [(4, 3), (4, 4)], False, *FLAGS[1:], False],
        560,
        "2*10*(4*3 + 4*4)",
        overload="input",
    ),
    Case("aten::lstm_cell", [(2, 3), [(2, 4), (2, 4)], (16, 3), (16, 4)], 448, "2*2*(16*3 + 16*4)"),
    Case("aten::gru_cell", [(2, 3), (2, 4), (12, 3), (12, 4)], 336, "2*2*(12*3 + 12*4)"),
    Case("aten::rnn_tanh_cell", [(2, 3), (2, 4), (4, 3), (4, 4)], 112, "2*2*(4*3 + 4*4)"),
    Case("aten::rnn_relu_cell", [(2, 3), (2, 4), (4, 3), (4, 4)], 112, "2*2*(4*3 + 4*4)"),
    Case("aten::mkldnn_rnn_layer", lstm, 2240, "2*10*(16*3 + 16*4)"),
    # Weight gradients of both, and back through the 8 rows after the first step.
    Case("aten::mkldnn_rnn_layer_backward", lstm, 3264, "2*10*(16*3 + 16*4) + 2*8*(16*4)"),
    Case(
        "aten::mkldnn_rnn_layer_backward", lambda: lstm(x=True), 4224, "2*10*(16*3 + 16*4) + 2*8*(16*4) + 2*10*(16*3)"
    ),
    Case("aten::mkldnn_rnn_layer_backward", lambda: lstm(x=True, hx=True), 4480, "2 * 2*10*(16*3 + 16*4)"),
    Case("aten::mkldnn_rnn_layer_backward", frozen_lstm, 1984, "2*10*(16*3) + 2*8*(16*4)"),
    on_meta(
        "aten::_cudnn_rnn",
        [(5, 2, 3), LSTM, 4, None, *STATE, 2, 4, 0, 1, False, 0.0, True, False, [], None],
        2240,
        "2*10*(16*3 + 16*4)",
    ),
    on_meta(
        "aten::miopen_rnn",
        [(5, 2, 3), LSTM, 4, *STATE, 2, 4, 1, False, 0.0, True, False, [], None],
        2240,
        "2*10*(16*3 + 16*4)",
    ),
    on_shapes(
        "aten::_lstm_mps", [(5, 2, 3), STATE, LSTM, True, 1, 0.0, True, False, False], 2240, "2*10*(16*3 + 16*4)"
    ),
    # Two directions each: the upper layer's input is 8 wide and always needs a gradient, the lower one's if x does.
    on_shapes(
        "aten::_cudnn_rnn_backward",
        cudnn_backward(2, False, False, False, True),
        21376,
        "2*(2*10*16*(3 + 4) + 2*8*16*4) + 2*(2*10*16*(8 + 4) + 2*8*16*4 + 2*10*16*8)",
    ),
    on_shapes(
        "aten::_cudnn_rnn_backward",
        cudnn_backward(2, True, True, True, True),
        24320,
        "2*(2 * 2*10*16*(3 + 4)) + 2*(2 * 2*10*16*(8 + 4))",
    ),
    on_shapes(
        "aten::_cudnn_rnn_backward",
        cudnn_backward(2, True, False, False, False),
        11136,
        "2*(2*10*16*3 + 2*8*16*4) + 2*(2*10*16*8 + 2*8*16*4)",
    ),
    # Packed 2 + 2 + 1: forward in time the first step has 2 rows, backward in time 1.
    on_shapes(
        "aten::_cudnn_rnn_backward",
        cudnn_backward(2, False, False, False, True, batch_sizes=(2, 2, 1)),
        10432,
        "2*(2*5*16*(3 + 4) + 2*5*16*(8 + 4) + 2*5*16*8) + 2 * 2*(5 - 2)*16*4 + 2 * 2*(5 - 1)*16*4",
    ),
    on_shapes(
        "aten::miopen_rnn_backward",
        miopen_backward(True, True, True, True),
        24320,
        "2*(2 * 2*10*16*(3 + 4)) + 2*(2 * 2*10*16*(8 + 4))",
    ),
    on_shapes(
        "aten::lstm_mps_backward",
        [None, None, None, (1,), (1,), (5, 2, 3), (1,), STATE, LSTM, True, 1, 0.0, True, False, False],
        4480,
        "2 * 2*10*(16*3 + 16*4)",
    ),
]
