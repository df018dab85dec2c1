"""Optimizers that multiply, and models whose parts are replaced: what tells them apart."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from flopprof import Meter

ROWS = 4


def newton_schulz(rows: int, columns: int) -> int:
    """Muon's five iterations on a matrix of rows <= columns: A = X X^T, B = b A + c A A, X = a X + B X."""
    return 5 * (2 * rows * rows * columns + 2 * rows**3 + 2 * rows * rows * columns)


def hardware(meter: Meter) -> list[int | None]:
    return [record.hardware_flops for record in meter.records]


@pytest.fixture
def layers() -> list[nn.Linear]:
    return [nn.Linear(m, n, bias=False) for m, n in pairwise((8, 16, 32))]


def test_two_optimizers_of_one_class_have_work_of_their_own(layers: list[nn.Linear]) -> None:
    model = nn.Sequential(*layers)
    optimizers = [torch.optim.Muon(layer.parameters()) for layer in layers]
    steps = [[0, 1], [0, 1], [0, 1], [0], [1], [0], [1], [1], [0], [0, 1], [1, 0], [1, 0]]
    with Meter(model) as meter:
        for chosen in steps:
            with meter.step():
                model(torch.randn(ROWS, 8)).sum().backward()
                for i in chosen:
                    optimizers[i].step()
                model.zero_grad()
        meter.summary()
        both = 2 * (2 * ROWS * 8 * 16) + 3 * (2 * ROWS * 16 * 32)
        own = [newton_schulz(8, 16), newton_schulz(16, 32)]
        for chosen, found in zip(steps, hardware(meter), strict=True):
            assert found in (both + sum(own[i] for i in chosen), None)
        assert None not in hardware(meter)[:4]


def test_a_teacher_whose_layers_are_replaced(layers: list[nn.Linear]) -> None:
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).requires_grad_(requires_grad=False)
    student = nn.Linear(8, 4)
    expected = []
    with Meter(student, teacher) as meter:
        for i in range(8):
            if i == 4:
                teacher[0], teacher[1] = nn.Linear(8, 160), nn.Linear(160, 4)
            with meter.step(), torch.no_grad():
                teacher(torch.randn(ROWS, 8))
            expected.append(2 * ROWS * 12 * (160 if i >= 4 else 16))
        assert hardware(meter) == expected


def test_a_model_in_inference_whose_layer_grows() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with Meter(model) as meter, torch.no_grad():
        for width in (16, 16, 16, 160, 160):
            if width != model[0].out_features:
                model[0], model[1] = nn.Linear(8, width), nn.Linear(width, 4)
            with meter.step():
                model(torch.randn(ROWS, 8))
        assert hardware(meter) == [2 * ROWS * 12 * width for width in (16, 16, 16, 160, 160)]


def test_tokens_of_a_batch_in_a_dict() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.table(batch["input_ids"])

    model = Reads()
    with Meter(model) as meter:
        for _ in range(3):
            with meter.step():
                model({"input_ids": torch.zeros(2, 8, dtype=torch.long)}).sum().backward()
        assert [(record.tokens, record.samples) for record in meter.records] == [(16, 2)] * 3


def test_what_an_optimizer_multiplies_depends_on_which_parameters_have_a_gradient() -> None:
    narrow, wide = nn.Linear(8, 4, bias=False), nn.Linear(8, 16, bias=False)
    muon = torch.optim.Muon([narrow.weight, wide.weight])
    with Meter(narrow, wide) as meter:
        for i in range(12):
            with meter.step():
                (narrow, wide)[i % 2](torch.randn(3, 8)).sum().backward()
                muon.step()
                muon.zero_grad()
        each = [4 * 3 * 8 * 4 + newton_schulz(4, 8), 4 * 3 * 8 * 16 + newton_schulz(8, 16)]
        found = hardware(meter)
        assert found[:4:3] == [each[0], each[1]]
        assert all(flops in (each[i % 2], None) for i, flops in enumerate(found))
        assert None not in found[4:]


def test_a_group_that_is_added_to_an_optimizer_that_multiplies(layers: list[nn.Linear]) -> None:
    model = nn.Sequential(*layers)
    muon = torch.optim.Muon(layers[0].parameters())
    both = 2 * (2 * ROWS * 8 * 16) + 3 * (2 * ROWS * 16 * 32)
    with Meter(model) as meter:
        for i in range(10):
            if i == 6:
                muon.add_param_group({"params": [layers[1].weight]})
            with meter.step():
                model(torch.randn(ROWS, 8)).sum().backward()
                muon.step()
                model.zero_grad()
        meter.summary()
        later = both + newton_schulz(8, 16) + newton_schulz(16, 32)
        assert hardware(meter)[:6] == [both + newton_schulz(8, 16)] * 6
        assert all(found in (later, None) for found in hardware(meter)[6:])
        assert hardware(meter)[-1] == later


@pytest.mark.parametrize("widths", [{0: 8, 10: 4, 11: 16, 20: 4}, {i: 4 + i % 3 for i in range(30)}])
def test_a_parameter_replaced_inside_the_step_before_the_call(widths: dict[int, int]) -> None:
    model = nn.Linear(8, 8, bias=False)
    expected, width = [], 8
    with Meter(model) as meter:
        for i in range(30):
            with meter.step():
                if i in widths:
                    width = widths[i]
                    model.weight = nn.Parameter(torch.randn(width, 8))
                model(torch.randn(2, 8)).sum().backward()
            expected.append(2 * 2 * 2 * 8 * width)
        assert hardware(meter) == expected
