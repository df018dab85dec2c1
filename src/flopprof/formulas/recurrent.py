"""Recurrent networks: at each step every weight matrix meets one vector per sequence: 2 rows numel(weight).

Rows are (sequence, step) pairs, real ones only where sequences are packed. Gates, biases and states are elementwise.
Every fused path costs what the unfused one runs, integer for integer, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flopprof.formulas.operand import Tensor, Wanted
from flopprof.formulas.registry import formula, product


def _matrices(weights: Sequence[Any]) -> int:
    """Elements of the weight matrices; biases are vectors."""
    return sum(product(weight.shape) for weight in weights if len(weight.shape) == 2)


def _rows(x: Tensor) -> int:
    """Sequence-steps of (time, batch, features), (batch, time, features) or packed (rows, features)."""
    return product(x.shape[:-1])


@formula("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", operands=(0, 2, 3))
def rnn(x: Tensor, *args: Any, out: Any) -> int:
    """All layers and directions: 2 rows numel of every weight matrix.

    Arguments are (x, state, weights, ...), or packed (x, batch_sizes, state, weights, ...).
    """
    state_or_weights = args[1]
    packed = not isinstance(args[2], bool)
    return 2 * _rows(x) * _matrices(args[2] if packed else state_or_weights)


@formula("aten::lstm_cell", "aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell", operands=(0, 1, 2, 3))
def rnn_cell(x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, *_: Any, out: Any) -> int:
    """One step: 2 batch numel of both weights."""
    return 2 * _rows(x) * _matrices((w_ih, w_hh))


@formula("aten::mkldnn_rnn_layer", operands=(0, 1, 2, 5))
def mkldnn_rnn_layer(x: Tensor, w_ih: Tensor, w_hh: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """One layer, one direction: 2 rows numel of both weights."""
    return 2 * _rows(x) * _matrices((w_ih, w_hh))


@formula("aten::_cudnn_rnn", "aten::miopen_rnn", operands=(0, 1))
def cudnn_rnn(x: Tensor, weights: Any, *_: Any, out: Any, **__: Any) -> int:
    """All layers and directions: 2 rows numel of every weight matrix."""
    return 2 * _rows(x) * _matrices(weights)


@formula("aten::_lstm_mps", operands=(0, 1, 2))
def lstm_mps(x: Tensor, state: Any, weights: Any, *_: Any, out: Any) -> int:
    """All layers and directions: 2 rows numel of every weight matrix."""
    return 2 * _rows(x) * _matrices(weights)


# --- backward ------------------------------------------------------------------------------------------------------
def layer_backward(
    rows: int, first: int, weights: Sequence[Any], wanted: Sequence[bool], x: bool, hx: bool, cx: bool
) -> int:
    """Gradients of one layer in one direction, as autograd runs the unfused one.

    weights are w_ih, w_hh, then biases, then w_hr where the state is projected; wanted (of the weights, biases
    included) and x, hx, cx say what needs a gradient. The first step's hidden state is hx, so its `first` rows need
    the product with w_hh only if hx does; the later ones need it whenever anything before them does.
    """
    w_ih, w_hh = weights[:2]
    projected = len(weights) > 2 and len(weights[-1].shape) == 2
    gates = x or hx or cx or any(wanted[:-1] if projected else wanted)
    if not gates and not any(wanted):
        return 0
    flops = 2 * product(w_ih.shape) * rows * (bool(wanted[0]) + bool(x))
    flops += 2 * product(w_hh.shape) * (rows * bool(wanted[1]) + rows - first + first * bool(hx))
    if projected:
        flops += 2 * product(weights[-1].shape) * (rows * bool(wanted[-1]) + (rows if gates else rows - first))
    return flops


@formula("aten::mkldnn_rnn_layer_backward", operands=(0, 1, 2, 5), wanted=True)
def mkldnn_rnn_layer_backward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Any,
    b_hh: Any,
    hx: Tensor,
    *_: Any,
    out: Any,
    wanted: Wanted = None,
    **__: Any,
) -> int:
    """One layer, one direction. Edges of the node: x, w_ih, w_hh, b_ih, b_hh, hx, cx.

    Without biases the kernel gets matrices of zeros in their place: they are no weights.
    """
    edges = wanted if wanted and len(wanted) == 7 else (True,) * 7
    return layer_backward(_rows(x), hx.shape[-2], (w_ih, w_hh), edges[1:5], edges[0], *edges[5:])


def stack_backward(
    x: Tensor,
    hx: Tensor,
    weights: Sequence[Any],
    directions: int,
    layers: int,
    batch_sizes: Sequence[int],
    wanted: tuple[bool, Sequence[bool], bool, bool],
) -> int:
    """Gradients of all layers and directions; wanted = (x, each weight, hx, cx).

    A layer's input needs a gradient whenever anything below it does. Backwards in time, a packed batch starts with
    its last, smallest step.
    """
    for_x, for_weights, for_hx, for_cx = wanted
    rows = _rows(x)
    firsts = (batch_sizes[0], batch_sizes[-1]) if batch_sizes else (hx.shape[-2],) * 2
    stride = len(weights) // (layers * directions)
    flops, below = 0, for_x
    for layer in range(layers):
        here = below or for_hx or for_cx
        for direction in range(directions):
            start = (layer * directions + direction) * stride
            own = for_weights[start : start + stride]
            group = weights[start : start + stride]
            flops += layer_backward(rows, firsts[direction], group, own, below, for_hx, for_cx)
            here = here or any(own)
        below = here
    return flops


def _edges(wanted: Wanted, mask: Sequence[bool], n_weights: int) -> tuple[bool, Sequence[bool], bool, bool]:
    """(x, each weight, hx, cx): from the edges of the node (x, weights ..., hx, cx), else from its mask."""
    if wanted and len(wanted) == n_weights + 3:
        return wanted[0], wanted[1:-2], wanted[-2], wanted[-1]
    for_x, for_hx, for_cx, for_weights = map(bool, mask)
    return for_x, (for_weights,) * n_weights, for_hx, for_cx


@formula("aten::_cudnn_rnn_backward", operands=(0, 1, 4), wanted=True)
def cudnn_rnn_backward(
    x: Tensor,
    weights: Any,
    weight_stride0: int,
    weight_buf: Any,
    hx: Tensor,
    cx: Any,
    output: Any,
    grad_output: Any,
    grad_hy: Any,
    grad_cy: Any,
    mode: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Any,
    dropout_state: Any,
    reserve: Any,
    output_mask: Any,
    *,
    out: Any,
    wanted: Wanted = None,
) -> int:
    """All layers and directions, packed sequences by their real lengths."""
    edges = _edges(wanted, output_mask, len(weights))
    return stack_backward(x, hx, weights, 1 + bool(bidirectional), num_layers, batch_sizes, edges)


@formula("aten::miopen_rnn_backward", operands=(0, 1, 4), wanted=True)
def miopen_rnn_backward(
    x: Tensor,
    weights: Any,
    weight_stride0: int,
    weight_buf: Any,
    hx: Tensor,
    cx: Any,
    output: Any,
    grad_output: Any,
    grad_hy: Any,
    grad_cy: Any,
    mode: int,
    hidden_size: int,
    num_layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Any,
    dropout_state: Any,
    reserve: Any,
    output_mask: Any,
    *,
    out: Any,
    wanted: Wanted = None,
) -> int:
    """All layers and directions, packed sequences by their real lengths."""
    edges = _edges(wanted, output_mask, len(weights))
    return stack_backward(x, hx, weights, 1 + bool(bidirectional), num_layers, batch_sizes, edges)


@formula("aten::lstm_mps_backward", operands=(5, 7, 8), wanted=True)
def lstm_mps_backward(
    grad_y: Any,
    grad_hy: Any,
    grad_cy: Any,
    z_state: Any,
    cell_state_fwd: Any,
    x: Tensor,
    layers_outputs: Any,
    state: Any,
    weights: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    out: Any,
    wanted: Wanted = None,
) -> int:
    """All layers and directions. Edges of the node: x, hx, cx, then the weights."""
    edges = wanted if wanted and len(wanted) == len(weights) + 3 else (True,) * (len(weights) + 3)
    needs = (edges[0], edges[3:], edges[1], edges[2])
    return stack_backward(x, state[0], weights, 1 + bool(bidirectional), num_layers, (), needs)
