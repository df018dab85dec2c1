"""Where other counters differ: both numbers are asserted, and the arithmetic says who is right.

FlopCounterMode's figures are those of torch 2.15, fvcore's (multiply-adds under the name of FLOPs) of 0.1.5. When
one of them mends a row, that test fails, and the row goes to `AGREE`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flopprof import FlopCounter
from releases import WRITTEN_FOR_THIS

Run = Callable[[], object]


def backward_of(module: nn.Module, *inputs: torch.Tensor) -> Run:
    def run() -> None:
        output = module(*inputs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()

    return run


def without_grad(module: nn.Module, *inputs: torch.Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            module(*inputs)

    return run


def flop_counter_mode(run: Run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def flopprof(run: Run) -> int:
    with FlopCounter() as counter:
        run()
    assert counter.profile.exact
    return counter.profile.hardware_flops


def x(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, requires_grad=grad, dtype=dtype)


def attend(q: torch.Tensor) -> Run:
    return lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()


def grouped_mm() -> Run:
    a, b = x(6, 8, dtype=torch.bfloat16), x(2, 8, 16, dtype=torch.bfloat16)
    return lambda: torch._grouped_mm(a, b, offs=torch.tensor([2, 6], dtype=torch.int32))


class Row(NamedTuple):
    run: Callable[[], Run]
    right: int
    theirs: int
    why: str


AGREE = {
    "linear": (lambda: backward_of(nn.Linear(8, 16), x(4, 8, grad=True)), 3 * 2 * 4 * 8 * 16),
    "conv2d": (lambda: backward_of(nn.Conv2d(3, 8, 3, padding=1), x(1, 3, 6, 6, grad=True)), 3 * 2 * 8 * 36 * 27),
    "bmm": (lambda: lambda: x(2, 3, 4) @ x(2, 4, 5), 2 * 2 * 3 * 4 * 5),
    # the fused kernel's second QK^T is executed, so hardware FLOPs hold it: 2 + 5 products of 2 * 8 * 8 * 4 * 2
    "attention": (lambda: attend(x(1, 2, 8, 4, grad=True)), 7 * 2 * 8 * 8 * 4 * 2),
    # forward, its replay, and a backward without the input's gradient: 512 each product
    "checkpoint": (
        lambda: (
            lambda: (
                checkpoint(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), x(4, 8), use_reentrant=False)
                .sum()
                .backward()
            )
        ),
        (2 + 1 + 3) * 2 * 4 * 8 * 8,
    ),
}

DIVERGE = {
    "grouped convolution backward": Row(
        lambda: backward_of(nn.Conv2d(8, 8, 3, groups=4, padding=1), x(1, 8, 6, 6, grad=True)),
        3 * 2 * 8 * 36 * (2 * 9),
        3 * 2 * 8 * 36 * (2 * 9) * 2,
        "FlopCounterMode's weight gradient ignores the groups: 4x of it",
    ),
    "transposed grouped convolution backward": Row(
        lambda: backward_of(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), x(1, 4, 5, 5, grad=True)),
        3 * 2 * 4 * 25 * (3 * 9),
        4 * 2 * 4 * 25 * (3 * 9),
        "FlopCounterMode ignores the groups in the weight gradient",
    ),
    "LSTM on CPU": Row(
        lambda: without_grad(nn.LSTM(8, 16), x(5, 2, 8)),
        2 * 10 * 64 * (8 + 16),
        0,
        "FlopCounterMode has no formula for mkldnn_rnn_layer",
    ),
    "encoder layer, evaluation": Row(
        lambda: without_grad(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), x(2, 5, 16)),
        2 * (2 * 5) * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 2 * 5 * 5 * 16,
        0,
        "FlopCounterMode does not look into the fused encoder layer",
    ),
    "attention module, evaluation": Row(
        lambda: without_grad(SelfAttention().eval(), x(2, 5, 16)),
        2 * (2 * 5) * 4 * 16 * 16 + 4 * 2 * 5 * 5 * 16,
        0,
        "FlopCounterMode does not look into the fused attention module",
    ),
    "grouped_mm": Row(grouped_mm, 2 * 6 * 8 * 16, 0, "FlopCounterMode has no formula: a mixture of experts is free"),
    "complex": Row(
        lambda: lambda: x(3, 4, dtype=torch.complex64) @ x(4, 5, dtype=torch.complex64),
        8 * 3 * 4 * 5,
        2 * 3 * 4 * 5,
        "a complex multiply-add is 4 real multiplications and 4 real additions",
    ),
    "matrix times vector": Row(lambda: lambda: x(6, 4) @ x(4), 2 * 6 * 4, 0, "FlopCounterMode has no mv"),
    "dot": Row(lambda: lambda: x(4) @ x(4), 2 * 4, 0, "FlopCounterMode has no dot"),
    "bilinear": Row(
        lambda: without_grad(nn.Bilinear(3, 4, 5), x(2, 3), x(2, 4)),
        2 * 2 * 3 * 4 * 5 + 2 * 2 * 4 * 5,
        0,
        "FlopCounterMode has no _trilinear",
    ),
    "sparse": Row(
        lambda: lambda: torch.sparse.mm(torch.eye(6).to_sparse(), x(6, 4)),
        2 * 6 * 4,
        0,
        "6 non-zeros of 4 columns; FlopCounterMode has no sparse product",
    ),
}


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", AGREE)
def test_agrees_with_flop_counter_mode(name: str) -> None:
    build, right = AGREE[name]
    assert flopprof(build()) == right
    if WRITTEN_FOR_THIS:
        assert flop_counter_mode(build()) == right


@pytest.mark.parametrize("name", DIVERGE)
def test_differs_from_flop_counter_mode_for_a_reason(name: str) -> None:
    row = DIVERGE[name]
    assert flopprof(row.run()) == row.right, row.why
    assert row.theirs != row.right
    if WRITTEN_FOR_THIS:
        assert flop_counter_mode(row.run()) == row.theirs, f"FlopCounterMode has changed: {row.why}"


def test_flop_counter_mode_crashes_where_autograd_grad_is_called() -> None:
    def run() -> None:
        inputs = x(4, 8, grad=True)
        torch.autograd.grad(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))(inputs).sum(), inputs)

    assert flopprof(run) == (2 + 2) * 2 * 4 * 8 * 8  # two products forward, two for the inputs' gradients
    if WRITTEN_FOR_THIS:
        with pytest.raises(RuntimeError):
            flop_counter_mode(run)


def test_flop_counter_mode_charges_efficientnet_fourteen_times() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model, inputs = torchvision.models.efficientnet_b0().eval(), torch.ones(1, 3, 224, 224)
    with FlopCounter(model) as counter:
        model(inputs).sum().backward()
    profile = counter.profile
    # The stem's input wants no gradient: its one missing product is all that keeps backward below twice forward.
    stem = profile.by_module("forward")["features.0.0"]
    assert profile.backward_flops == 2 * profile.forward_flops - stem
    if WRITTEN_FOR_THIS:
        theirs = flop_counter_mode(lambda: model(inputs).sum().backward())
        assert round(theirs / profile.hardware_flops) == 14
        assert 20 < (theirs - profile.forward_flops) / profile.backward_flops < 21


def test_recompute_is_apart_where_flop_counter_mode_merges_it() -> None:
    build, _total = AGREE["attention"]
    with FlopCounter() as counter:
        build()()
    product = 2 * 8 * 8 * 4 * 2
    assert counter.profile.by_phase() == {
        "forward": 2 * product, "backward": 4 * product, "recompute": product, "optimizer": 0
    }  # fmt: skip


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)


FVCORE = {
    "linear": (nn.Linear(8, 16), x(4, 8), 2 * 4 * 8 * 16, 4 * 8 * 16, "multiply-adds"),
    "grouped conv": (nn.Conv2d(8, 8, 3, groups=4), x(1, 8, 6, 6), 2 * 8 * 16 * 18, 8 * 16 * 18, "multiply-adds"),
    "attention": (Attention(), x(1, 2, 8, 4), 4 * 2 * 8 * 8 * 4, 0, "no scaled_dot_product_attention"),
    "lstm": (nn.LSTM(8, 16), x(5, 2, 8), 2 * 10 * 64 * 24, 0, "no lstm"),
    "conv3d": (nn.Conv3d(2, 3, 2), x(1, 2, 3, 3, 3), 2 * 3 * 8 * 16, 3 * 8 * 16, "multiply-adds"),
}


@pytest.mark.parametrize("name", FVCORE)
@pytest.mark.filterwarnings("ignore")
def test_differs_from_fvcore_for_a_reason(name: str) -> None:
    module, inputs, right, theirs, why = FVCORE[name]
    fvcore = pytest.importorskip("fvcore.nn")
    assert flopprof(without_grad(module, inputs)) == right
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        assert fvcore.FlopCountAnalysis(module, inputs).total() == theirs, why
