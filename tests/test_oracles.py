"""The oracles against the formulas, and proof that each oracle rejects a wrong answer."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import oracles
from flopprof.formulas import RULES, Cost


def stand_in(shape: tuple[int, ...]) -> Any:
    return SimpleNamespace(shape=shape)


def formula(op: str, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """The rule's answer on stand-ins: tuples are shapes."""
    made = [stand_in(arg) if isinstance(arg, tuple) else arg for arg in args]
    return RULES[op].formula(*made, out=stand_in(out) if isinstance(out, tuple) else out, **kwargs)


SIZES = list(itertools.product((1, 2, 3), (1, 4), (1, 2, 5)))


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_matrix_products(m: int, k: int, n: int) -> None:
    expected = oracles.mm_flops(m, k, n)
    assert formula("aten::mm", (m, k), (k, n)) == expected == oracles.einsum_flops("mk,kn->mn", (m, k), (k, n))
    assert formula("aten::addmm", (n,), (m, k), (k, n)) == expected
    assert formula("aten::linear", (m, k), (n, k), out=(m, n)) == expected
    assert formula("aten::matmul", (m, k), (k, n), out=(m, n)) == expected
    assert formula("aten::bmm", (3, m, k), (3, k, n)) == oracles.bmm_flops(3, m, k, n)
    assert formula("aten::mv", (m, k), (k,)) == oracles.mm_flops(m, k, 1)
    assert formula("aten::dot", (k,), (k,)) == oracles.mm_flops(1, k, 1)


CONVOLUTIONS = [
    {"x": (2, 4, 7), "weight": (6, 4, 3)},
    {"x": (2, 4, 7), "weight": (6, 2, 3), "groups": 2, "stride": 2},
    {"x": (1, 3, 5, 6), "weight": (4, 3, 3, 2), "padding": 1},
    {"x": (1, 4, 7, 7), "weight": (4, 1, 3, 3), "groups": 4, "dilation": 2, "padding": 2},
    {"x": (1, 2, 4, 4, 4), "weight": (2, 1, 2, 2, 2), "groups": 2, "stride": 2},
]


@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_convolutions(sizes: dict[str, Any]) -> None:
    options = {key: value for key, value in sizes.items() if key not in ("x", "weight")}
    x, weight = (torch.empty(sizes[name], device="meta", requires_grad=True) for name in ("x", "weight"))
    run = (None, torch.conv1d, torch.conv2d, torch.conv3d)[x.ndim - 2]
    out = run(x, weight, **options)
    expected = oracles.conv_flops(sizes["x"], sizes["weight"], **options)
    rest = (None, [1], [0], [1], False, [0], options.get("groups", 1))
    assert RULES["aten::convolution"].formula(x, weight, *rest, out=out) == expected
    for mask in ([True, True, True], [False, True, False], [False, False, True]):
        backward = RULES["aten::convolution_backward"].formula(out, x, weight, *rest, mask, out=None)
        assert backward == expected * sum(mask[:2])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "output_padding": 1}, {"padding": 1}], ids=str)
def test_transposed_convolutions(groups: int, options: dict[str, int]) -> None:
    x, weight = torch.empty(2, 4, 5, 5, device="meta"), torch.empty(4, 3, 2, 2, device="meta")
    out = torch.conv_transpose2d(x, weight, groups=groups, **options)
    expected = oracles.conv_transpose_flops(x.shape, weight.shape, groups=groups)
    assert RULES["aten::conv_transpose2d"].formula(x, weight, out=out) == expected


MASKS = {
    "full": (lambda i, j: True, {}),
    "causal": (lambda i, j: j <= i, {"is_causal": True}),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "s", "t", "d", "dv"), [(2, 3, 3, 4, 4), (2, 3, 5, 2, 3), (4, 5, 2, 1, 2)])
def test_attention(mask: str, heads: int, s: int, t: int, d: int, dv: int) -> None:
    sees, options = MASKS[mask]
    q, k, v = (2, heads, s, d), (2, 2, t, d), (2, 2, t, dv)
    cost = formula("aten::scaled_dot_product_attention", q, k, v, out=(2, heads, s, dv), enable_gqa=True, **options)
    assert isinstance(cost, Cost)
    assert cost.flops == oracles.attention_flops(q, k, v, MASKS["full"][0])
    assert (cost.flops if cost.causal is None else cost.causal) == oracles.attention_flops(q, k, v, sees)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
def test_attention_backward(wanted: tuple[bool, bool, bool]) -> None:
    q, k, v = (2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)
    op = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    cost = formula(op, (2, 3, 4, 5), q, k, v, (2, 3, 4, 5), (2, 3, 4), 0.0, False, wanted=wanted)
    assert cost.flops == oracles.attention_backward_flops(q, k, v, wanted)
    assert cost.recompute == (oracles.bmm_flops(6, 4, 5, 6) if any(wanted) else 0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("lengths", [(3, 3), (4, 2, 1)], ids=str)
def test_recurrent(kind: type[nn.RNNBase], layers: int, directions: int, lengths: tuple[int, ...]) -> None:
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    projection = 2 if kind is nn.LSTM else 0
    options = {"proj_size": projection} if projection else {}
    model = kind(3, 4, layers, bidirectional=directions == 2, device="meta", **options)
    rows = stand_in((sum(lengths), 3))
    expected = oracles.rnn_flops(lengths, 3, 4, gates, layers=layers, directions=directions, projection=projection)
    assert RULES["aten::_cudnn_rnn"].formula(rows, list(model._flat_weights), out=None) == expected


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
def test_sparse() -> None:
    a = torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 0], [4, 5, 0, 6]])
    b = torch.tensor([[0.0, 1], [2, 3], [4, 0], [0, 5]])
    dense = torch.ones(4, 5)
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        left, right = a.to_sparse(layout=layout), b.to_sparse(layout=layout)
        assert RULES["aten::mm"].formula(left, dense, out=None) == oracles.sparse_mm_flops(a.tolist(), dense.tolist())
        assert RULES["aten::mm"].formula(left, right, out=None) == oracles.sparse_mm_flops(a.tolist(), b.tolist())


def test_bilinear_is_two_contractions() -> None:
    first = oracles.einsum_flops("bi,oij->boj", (2, 3), (5, 3, 4))
    second = oracles.einsum_flops("boj,bj->bo", (2, 5, 4), (2, 4))
    cost = formula("aten::_trilinear", (2, 3), (5, 3, 4), (2, 4), [1, 3], [0], [1, 2], [2, 3])
    assert cost == first + second


# --- each oracle rejects a wrong answer ----------------------------------------------------------------------------
def test_the_matrix_oracle_multiplies_right_and_bites() -> None:
    machine = oracles.Machine()
    assert oracles.matmul(machine, [[1.0, 2.0]], [[3.0], [4.0]]) == [[11.0]]
    assert (machine.multiplications, machine.additions) == (2, 2)
    right = oracles.mm_flops(2, 3, 4)
    for wrong in (2 * 3 * 4, 2 * 2 * 3 * 3, 2 * 2 * 4, 2 * 2 * 3 * 4 + 8, 2 * 2 * 3 * 4 - 8):
        assert right != wrong
    assert oracles.bmm_flops(2, 2, 3, 4) == 2 * right != right


def test_the_convolution_oracle_bites() -> None:
    x, weight = (1, 4, 5, 5), (6, 2, 3, 3)
    right = oracles.conv_flops(x, weight, groups=2)
    assert right == 2 * (6 * 3 * 3) * (2 * 3 * 3)
    assert right != 2 * (6 * 3 * 3) * (4 * 3 * 3)  # forgets groups
    assert oracles.conv_flops(x, weight, groups=2, padding=1) == 2 * (6 * 5 * 5) * (2 * 3 * 3) != right
    assert oracles.conv_flops(x, weight, groups=2, dilation=2) == 2 * 6 * (2 * 3 * 3) != right
    assert oracles.conv_flops(x, weight, groups=2, stride=2) == 2 * (6 * 2 * 2) * (2 * 3 * 3) != right
    transposed = oracles.conv_transpose_flops((1, 4, 3, 3), (4, 3, 2, 2), groups=2)
    assert transposed == 2 * (4 * 3 * 3) * (3 * 2 * 2)
    assert transposed != 2 * (6 * 4 * 4) * (3 * 2 * 2)  # counts from the output


def test_the_attention_oracle_bites() -> None:
    shape = (1, 1, 3, 2)
    full = oracles.attention_flops(shape, shape, shape, MASKS["full"][0])
    causal = oracles.attention_flops(shape, shape, shape, MASKS["causal"][0])
    assert (full, causal) == (2 * 9 * 4, 2 * 6 * 4)
    assert causal != full // 2  # the diagonal is seen
    backward = oracles.attention_backward_flops(shape, shape, shape, (True, True, True))
    assert backward == 2 * full
    assert backward != full + full // 2 + full  # a recompute would be in it
    assert oracles.attention_backward_flops(shape, shape, shape, (False, False, True)) == full // 2


def test_the_recurrent_oracle_bites() -> None:
    one = oracles.rnn_flops((5, 2), 3, 4, 4)
    assert one == 2 * 7 * 16 * (3 + 4)
    assert one != 2 * 10 * 16 * (3 + 4)  # pads
    assert oracles.rnn_flops((5, 2), 3, 4, 4, projection=2) == 2 * 7 * (16 * (3 + 2) + 2 * 4) != one


def test_the_sparse_oracle_bites() -> None:
    a, b = [[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [4.0, 5.0]]
    assert oracles.sparse_mm_flops(a, b) == 2 * 3
    assert oracles.sparse_mm_flops(a, b) != 2 * 2 * 2 * 2  # dense
    assert oracles.sparse_mm_flops(a, b) != 2 * 2 * 2  # by the non-zeros of one side


def test_the_einsum_oracle_bites() -> None:
    assert oracles.einsum_flops("ij,jk->ik", (2, 3), (3, 4)) == 48 != 24
    assert oracles.einsum_flops("ij,ij->ij", (2, 3), (2, 3)) == 0
    assert oracles.einsum_flops("i,j->ij", (2,), (3,)) == 0
    assert oracles.einsum_flops("bi,oij->boj", (2, 3), (5, 3, 4)) == 2 * 2 * 3 * 5 * 4
    with pytest.raises(ValueError, match="index j is 3 and 4"):
        oracles.einsum_flops("ij,jk->ik", (2, 3), (4, 5))
