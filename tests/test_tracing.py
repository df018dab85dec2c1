"""Tracers inside a counter trace what they trace without one; symbolic sizes are not counted, and the profile says so.

Every model is a linear layer 8 -> 8 or x sin(x) x^T on 3 rows of 8: 2 * 3*8*8 and 2 * 3*8*3 a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, aot_module, nop
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from doubling import Double
from flopprof import FlopCounter
from flopprof.counting.foreign import SYMBOLIC

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")

LINEAR, SQUARE = 2 * 3 * 8 * 8, 2 * 3 * 8 * 3


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8)


def square(x: torch.Tensor) -> torch.Tensor:
    return x.sin() @ x.mT


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + torch.arange(x.shape[0])[:, None]


TRACERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "make_fx, symbolic": make_fx(square, tracing_mode="symbolic"),
    "make_fx, symbolic, elementwise": make_fx(doubled, tracing_mode="symbolic"),
    "make_fx": make_fx(square),
    "export, dynamic": lambda x: (
        torch.export.export(
            nn.Linear(8, 8), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},)
        ).graph_module
    ),
}


@pytest.mark.parametrize("name", TRACERS)
def test_a_trace_is_the_same_inside_a_counter(name: str, x: torch.Tensor) -> None:
    plain = TRACERS[name](x)
    with FlopCounter() as counter:
        inside = TRACERS[name](x)
    assert inside.code == plain.code
    sizes = [str([node.meta.get("val") for node in graph.graph.nodes]) for graph in (plain, inside)]
    assert sizes[0] == sizes[1]
    reasons = {row.reason for row in counter.profile.uncounted_rows}
    assert reasons == ({SYMBOLIC} if name != "make_fx" else set())
    assert counter.profile.forward_flops == (SQUARE if name == "make_fx" else 0)


def test_a_function_traced_for_its_backward_counts_as_it_runs(x: torch.Tensor) -> None:
    with FlopCounter() as counter:
        out = aot_function(square, nop)(x)
    assert torch.equal(out, square(x))
    assert counter.profile.exact
    assert counter.profile.forward_flops == SQUARE


def test_a_module_traced_for_its_backward_trains_as_it_does_without_a_counter(x: torch.Tensor) -> None:
    layer = nn.Linear(8, 8)
    layer(x).sum().backward()
    plain, layer.weight.grad = layer.weight.grad, None
    with FlopCounter() as counter:
        aot_module(layer, nop)(x).sum().backward()
    assert torch.equal(layer.weight.grad, plain)
    assert counter.profile.exact
    assert counter.profile.forward_flops % LINEAR == 0


def test_a_recorded_trace_passes_its_own_check(x: torch.Tensor) -> None:
    layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    plain = torch.jit.trace(layer, (x,))
    with FlopCounter():
        traced = torch.jit.trace(layer, (x,))
    numbered = r"___torch_mangle_\d+\."  # classes, anew for each trace
    graphs = [re.sub(numbered, "", model.inlined_graph.str(False)) for model in (plain, traced)]
    assert graphs[0] == graphs[1]
    assert torch.equal(traced(x), layer(x))


def test_a_recorded_trace_of_a_custom_function_reads_no_size(x: torch.Tensor) -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Double.apply(x)

    plain = torch.jit.trace(Calls(), (x,))
    with FlopCounter():
        traced = torch.jit.trace(Calls(), (x,))
    assert [node.kind() for node in traced.graph.nodes()] == [node.kind() for node in plain.graph.nodes()]
