"""Fused kernels and composites cost what the same mathematics costs unfused: attention layers, recurrences, nested."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flopprof import FlopCounter, Profile

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:.*nested tensor.*", "ignore:dropout option adds dropout",
    "ignore:.*chain_matmul.*", "ignore:enable_nested_tensor", "ignore:TF32 acceleration",
    "ignore:LSTM with projections", "ignore:Using padding=.same.",
)  # fmt: skip


def counted(run: Callable[[], Any], model: nn.Module | None = None) -> Profile:
    with FlopCounter(model) as counter:
        run()
    assert counter.profile.exact
    return counter.profile


def within(mode: str) -> AbstractContextManager[Any]:
    """The context of a mode: train and eval build a graph, the others do not."""
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    }
    return contexts.get(mode, nullcontext)()


# --- attention layers -----------------------------------------------------------------------------------------------
MODES = ["train", "eval", "no_grad", "inference"]
WIDTH, HIDDEN = 512, 2048


def dense(tokens: int) -> int:
    """Four projections and two feed-forward layers."""
    return 2 * tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)


def scores(length: int) -> int:
    """Q K^T and P V over all heads."""
    return 2 * 2 * length * length * WIDTH


def test_the_encoder_layers_closed_form() -> None:
    assert dense(512) + scores(512) == 3_758_096_384


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("layers", "flops"), [(1, 3_758_096_384), (6, 22_548_578_304)])
def test_transformer_encoder(mode: str, layers: int, flops: int) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 8, HIDDEN, batch_first=True, dropout=0.0)
    model = layer if layers == 1 else nn.TransformerEncoder(layer, layers)
    model.train(mode == "train").to("meta")  # shapes are enough; the fused path is taken there too
    with within(mode):
        assert counted(lambda: model(torch.empty(1, 512, WIDTH, device="meta"))).forward_flops == flops


@pytest.mark.parametrize("mode", MODES)
def test_transformer_encoder_layer_on_cpu(mode: str) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 8, HIDDEN, batch_first=True, dropout=0.0).train(mode == "train")
    x = torch.randn(1, 512, WIDTH)
    with within(mode):
        profile = counted(lambda: layer(x), layer)
    assert profile.forward_flops == 3_758_096_384
    if mode == "no_grad":  # one operator, which calls none of the layer's modules
        assert profile.by_module(own=True) == {"": 3_758_096_384}


def test_transformer_encoder_layer_backward_is_twice_its_forward() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    x = torch.randn(2, 10, 32, requires_grad=True)
    profile = counted(lambda: layer(x).sum().backward())
    assert profile.forward_flops == 2 * 20 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 2 * 100 * 32
    assert profile.backward_flops == 2 * profile.forward_flops


@pytest.mark.parametrize("mode", MODES)
def test_padded_batch(mode: str) -> None:
    """With a padding mask the fused path packs the tokens that are real; torch pads them again to attend."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 3)
    model.train(mode == "train")
    x, padding = torch.randn(2, 10, 32), torch.zeros(2, 10, dtype=torch.bool)
    padding[1, 6:] = True
    tokens = 10 + 6 if mode in ("no_grad", "inference") else 2 * 10
    with within(mode):
        profile = counted(lambda: model(x, src_key_padding_mask=padding))
    products = 2 * tokens * (4 * 32 * 32 + 2 * 32 * 64)
    assert profile.forward_flops == 3 * (products + 2 * 2 * 2 * 10 * 10 * 32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("keys", [10, 7])
def test_multihead_attention(mode: str, *, batch_first: bool, need_weights: bool, keys: int) -> None:
    batch, queries, width = 3, 10, 32
    attention = nn.MultiheadAttention(width, 4, batch_first=batch_first).train(mode == "train")
    q = torch.randn(batch, queries, width)
    kv = q if keys == queries else torch.randn(batch, keys, width)
    if not batch_first:
        q = q.transpose(0, 1)
        kv = q if keys == queries else kv.transpose(0, 1)
    with within(mode):
        profile = counted(lambda: attention(q, kv, kv, need_weights=need_weights))
    projections = 2 * batch * (2 * queries + 2 * keys) * width * width
    assert profile.forward_flops == projections + 2 * 2 * batch * queries * keys * width


def test_multihead_attention_with_other_key_sizes_and_a_learnt_key() -> None:
    attention = nn.MultiheadAttention(32, 4, kdim=20, vdim=24, add_bias_kv=True, batch_first=True)
    profile = counted(lambda: attention(torch.randn(3, 10, 32), torch.randn(3, 7, 20), torch.randn(3, 7, 24)))
    projections = 2 * 3 * (2 * 10 * 32 * 32 + 7 * 20 * 32 + 7 * 24 * 32)
    assert profile.forward_flops == projections + 2 * 2 * 3 * 10 * (7 + 1) * 32


# --- recurrences ----------------------------------------------------------------------------------------------------
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
BATCH, STEPS, INPUT, STATE = 3, 5, 4, 6
LENGTHS = [5, 3, 2]
FIRST_FORWARD, FIRST_BACKWARD = 3, 1  # sequences in the first step taken, where they are packed


def recurrence(kind: str, rows: int, firsts: list[int], layers: int, projection: int) -> tuple[int, int]:
    """(forward, backward) where the input and the initial states want no gradient.

    Each row of each layer and direction meets a (gates x state, input) and a (gates x state, output) weight; backward
    makes both weights' gradients, the input's above the first layer, and the state's after the first step.
    """
    output, width = projection or STATE, INPUT
    forward = backward = 0
    for layer in range(layers):
        for first in firsts:
            of_input = 2 * rows * GATES[kind] * STATE * width
            of_state = 2 * GATES[kind] * STATE * output
            of_output = 2 * rows * STATE * projection
            forward += of_input + rows * of_state + of_output
            backward += of_input * (2 if layer else 1) + (2 * rows - first) * of_state + 2 * of_output
        width = output * len(firsts)
    return forward, backward


@pytest.mark.parametrize("mode", ["fused", "no mkldnn", "meta", "no_grad", "inference"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "projection"), [("RNN", 0), ("LSTM", 0), ("LSTM", 2), ("GRU", 0)])
def test_recurrences(kind: str, projection: int, layers: int, mode: str, *, bidirectional: bool, packed: bool) -> None:
    if packed and mode == "meta":
        pytest.skip("packing needs the lengths")
    device = "meta" if mode == "meta" else "cpu"
    more = {"proj_size": projection} if projection else {}
    model = getattr(nn, kind)(
        INPUT, STATE, layers, batch_first=True, bidirectional=bidirectional, device=device,
        dropout=0.5 if layers > 1 else 0, **more,
    )  # fmt: skip
    x: Any = torch.randn(BATCH, STEPS, INPUT, device=device)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True)
    graph = mode not in ("no_grad", "inference")

    def run() -> None:
        out, _state = model(x)
        if graph:
            (out.data if packed else out).sum().backward()

    firsts = [FIRST_FORWARD, FIRST_BACKWARD] if packed else [BATCH, BATCH]
    rows = sum(LENGTHS) if packed else BATCH * STEPS
    forward, backward = recurrence(kind, rows, firsts[: 1 + bidirectional], layers, projection)
    with within(mode):
        profile = counted(run, model)
    assert profile.forward_flops == forward
    assert profile.backward_flops == (backward if graph else 0)


def test_the_closed_form_of_recurrences_by_hand() -> None:
    # One LSTM layer: 15 rows x 24 gate values x (4 + 6) inputs; backward: no input gradient, no first state gradient.
    assert recurrence("LSTM", 15, [3], 1, 0) == (2 * 15 * 24 * 10, 2 * 15 * 24 * 10 + 2 * (15 - 3) * 24 * 6)


@pytest.mark.parametrize("mode", ["train", "meta", "inference"])
@pytest.mark.parametrize("kind", GATES)
def test_cells(kind: str, mode: str) -> None:
    device = "meta" if mode == "meta" else "cpu"
    cell = getattr(nn, f"{kind}Cell")(INPUT, STATE, device=device)
    x = torch.randn(BATCH, INPUT, device=device)

    def run() -> None:
        out = cell(x)
        if mode != "inference":
            (out[0] if isinstance(out, tuple) else out).sum().backward()

    flops = 2 * BATCH * GATES[kind] * STATE * (INPUT + STATE)
    with within(mode):
        profile = counted(run)
    assert (profile.forward_flops, profile.backward_flops) == (flops, 0 if mode == "inference" else flops)


# --- nested tensors -------------------------------------------------------------------------------------------------
LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged])


@LAYOUTS
@pytest.mark.parametrize("mode", ["train", "no_grad", "inference"])
def test_nested_linear_sums_over_sequences(layout: torch.layout, mode: str) -> None:
    nested = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=layout)
    linear = nn.Linear(8, 6)
    with within(mode):
        assert counted(lambda: linear(nested)).forward_flops == 2 * (5 + 3) * 8 * 6


@LAYOUTS
def test_nested_linear_backward(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=layout)
    linear = nn.Linear(8, 6)

    def run() -> None:
        out = linear(nested)
        (out.values() if layout is torch.jagged else out.to_padded_tensor(0)).sum().backward()

    profile = counted(run)
    assert profile.by_phase() == {"forward": 768, "backward": 768, "recompute": 0, "optimizer": 0}


def test_a_module_over_jagged_sequences() -> None:
    nested = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=torch.jagged)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    profile = counted(lambda: model(nested), model)
    assert profile.by_module("forward", own=True) == {"": 0, "0": 2048, "1": 0, "2": 2048, "3": 0}


@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_nested_attention_on_cpu_runs_padded(mode: str) -> None:
    """Without a fused kernel torch pads nested attention to its longest sequence: 5 x 5 for both of 5 and 3."""
    q = torch.nested.nested_tensor([torch.randn(5, 2, 8), torch.randn(3, 2, 8)], layout=torch.jagged).transpose(1, 2)
    with within(mode):
        assert counted(lambda: F.scaled_dot_product_attention(q, q, q)).forward_flops == 2 * 2 * 2 * 2 * 5 * 5 * 8


# --- composites -----------------------------------------------------------------------------------------------------
COMPOSITES: dict[str, tuple[Callable[[], Any], int]] = {
    "einsum": (lambda: torch.einsum("bij,bjk->bik", torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "einsum of three": (
        lambda: torch.einsum("ij,jk,kl->il", torch.ones(3, 4), torch.ones(4, 5), torch.ones(5, 6)),
        2 * (3 * 4 * 5 + 3 * 5 * 6),
    ),
    "tensordot": (
        lambda: torch.tensordot(torch.ones(2, 3, 4), torch.ones(4, 3, 5), dims=([1, 2], [1, 0])),
        2 * 2 * 12 * 5,
    ),
    "conv1d same": (lambda: F.conv1d(torch.ones(2, 3, 10), torch.ones(4, 3, 4), padding="same"), 2 * 20 * 4 * 12),
    "conv2d same": (
        lambda: F.conv2d(torch.ones(2, 3, 7, 9), torch.ones(4, 3, 3, 2), padding="same"),
        2 * 2 * 63 * 4 * 18,
    ),
    "conv3d same": (
        lambda: F.conv3d(torch.ones(1, 2, 4, 5, 6), torch.ones(3, 2, 2, 3, 3), padding="same"),
        2 * 120 * 3 * 36,
    ),
    "unbatched conv1d": (lambda: F.conv1d(torch.ones(3, 10), torch.ones(4, 3, 4)), 2 * 7 * 4 * 12),
    "conv_transpose2d": (
        lambda: F.conv_transpose2d(torch.ones(1, 4, 5, 5), torch.ones(4, 3, 3, 3), stride=2, output_padding=1),
        2 * 25 * 4 * 27,
    ),
    "conv_tbc": (lambda: torch.conv_tbc(torch.ones(10, 2, 3), torch.ones(4, 3, 5), torch.ones(5)), 2 * 14 * 5 * 12),
    # x1 W for every output, then that times x2.
    "bilinear": (
        lambda: F.bilinear(torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 3, 4)),
        2 * 2 * 5 * 3 * 4 + 2 * 2 * 5 * 4,
    ),
    "chain_matmul": (
        lambda: torch.chain_matmul(torch.ones(2, 30), torch.ones(30, 4), torch.ones(4, 5)),
        2 * 2 * (30 * 4 + 4 * 5),
    ),
    "multi_dot": (
        lambda: torch.linalg.multi_dot([torch.ones(10, 30), torch.ones(30, 5), torch.ones(5, 60)]),
        2 * (10 * 30 * 5 + 10 * 5 * 60),
    ),
    # Squared norms ride along as two more columns of the product.
    "cdist": (lambda: torch.cdist(torch.ones(30, 8), torch.ones(40, 8)), 2 * 30 * 40 * (8 + 2)),
    "broadcast matmul": (lambda: torch.matmul(torch.ones(2, 1, 3, 4), torch.ones(5, 4, 6)), 2 * 10 * 3 * 4 * 6),
    "inner": (lambda: torch.inner(torch.ones(2, 3), torch.ones(4, 3)), 2 * 2 * 4 * 3),
    "linear of a vector": (lambda: F.linear(torch.ones(3), torch.ones(4, 3), torch.ones(4)), 2 * 4 * 3),
    "matrix_power": (lambda: torch.linalg.matrix_power(torch.ones(4, 4), 5), 3 * 2 * 4**3),
    "attention": (lambda: F.scaled_dot_product_attention(*[torch.ones(1, 2, 5, 4)] * 3), 2 * 2 * 25 * (4 + 4)),
    "masked attention": (
        lambda: F.scaled_dot_product_attention(*[torch.ones(1, 2, 5, 4)] * 3, attn_mask=torch.zeros(5, 5)),
        2 * 2 * 25 * (4 + 4),
    ),
    "grouped-query attention": (
        lambda: F.scaled_dot_product_attention(torch.ones(1, 4, 5, 4), *[torch.ones(1, 2, 5, 4)] * 2, enable_gqa=True),
        2 * 4 * 25 * (4 + 4),
    ),
    "covariance": (lambda: torch.cov(torch.ones(3, 10)), 2 * 3 * 3 * 10),
    "outer product": (lambda: torch.kron(torch.ones(2, 2), torch.ones(3, 3)), 0),
}


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name: str, mode: str) -> None:
    run, flops = COMPOSITES[name]
    with within(mode):
        assert counted(run).forward_flops == flops
