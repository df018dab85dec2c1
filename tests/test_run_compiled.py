"""Compiled parts of a script that is metered: every call is seen, nothing is compiled again, no warning comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flopprof.meter.contiguous import Contiguous
from flopprof.meter.script import Script

# As the compiler itself warns.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

INPUTS, HIDDEN, OUTPUTS = 8, 16, 4
# Per row: both layers forward and both weights' gradients; the second one's input's.
ROW = 2 * 2 * (INPUTS * HIDDEN + HIDDEN * OUTPUTS) + 2 * HIDDEN * OUTPUTS
SIZES = [32, 32, 32, 16, 16, 32, 16, 8, 32]


class Compiles:
    """A backend that runs the graph as it is, and tells how often it was asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))


def as_module(model: nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model: nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    model.compile(backend=backend)
    return model


def in_function(model: nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.compile(backend=backend)
    def forward(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    return forward


def loop(compiled: Callable[..., Any], *, optimizer_too: bool = False) -> int:
    torch._dynamo.reset()
    backend, model = Compiles(), net()
    forward = compiled(model, backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if optimizer_too:
        optimizer.step = torch.compile(optimizer.step, backend=backend)  # type: ignore[method-assign]
    for rows in SIZES:
        forward(torch.randn(rows, INPUTS)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return backend.graphs


def metered(compiled: Callable[..., Any], **options: Any) -> tuple[int, Any]:
    script = Script(lambda: Contiguous(peak=1e12, skip=0))
    script.install()
    try:
        graphs = loop(compiled, **options)
    finally:
        script.remove()
    assert script.meter is not None
    return graphs, script.meter.records


@pytest.mark.parametrize("compiled", [as_module, in_function, in_place])
def test_compiled_calls_are_seen_with_their_sizes(compiled: Callable[..., Any]) -> None:
    graphs, records = metered(compiled)
    assert [record.model_flops for record in records] == [rows * ROW for rows in SIZES]
    assert any(not record.left_out for record in records)
    assert graphs == loop(compiled)


@pytest.mark.nightly
def test_a_compiled_step_of_an_optimizer_ends_a_step() -> None:
    graphs, records = metered(lambda model, _: model, optimizer_too=True)
    assert [record.model_flops for record in records] == [rows * ROW for rows in SIZES]
    assert [record.optimizer_steps for record in records] == [1] * len(SIZES)
    assert graphs == loop(lambda model, _: model, optimizer_too=True)
