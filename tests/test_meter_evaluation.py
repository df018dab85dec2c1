"""Evaluation where it is awkward: between a backward pass and the optimizer's step."""

import torch
from torch import nn

from flopprof import Meter

PER_ROW = 2 * 8 * 4


def test_the_step_of_an_optimizer_ends_an_evaluation() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    now = 0.0
    with Meter(model, clock=lambda: now) as meter:
        for i in range(12):
            with meter.step():
                model(torch.randn(2, 8)).sum().backward()
                now += 1.0
                if i % 3 == 2:
                    model.eval()
                    with torch.no_grad():
                        model(torch.randn(9, 8))
                    now += 5.0
                    model.train()
                optimizer.step()
                optimizer.zero_grad()
                now += 2.0
        assert [record.optimizer_steps for record in meter.records] == [1] * 12
        assert [record.model_flops for record in meter.records] == [4 * PER_ROW] * 12
        assert [record.step_time_s for record in meter.records] == [3.0] * 12
        assert [record.evaluation_s for record in meter.records] == [0.0, 0.0, 5.0] * 4
        assert meter.summary().signatures == 1
