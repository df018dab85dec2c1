"""Evaluation where it is awkward: between a backward pass and the optimizer's step."""

import torch
from torch import nn

from flopprof import Meter
from wrapped import Wrapper

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


def test_what_a_wrapper_holds_is_evaluated_in_the_very_step_that_is_counted() -> None:
    model = Wrapper(nn.Linear(8, 4, bias=False))
    with Meter(model) as meter:
        for i in range(6):
            with meter.step():
                model(torch.randn(2, 8)).sum().backward()
                if i % 3 == 0:
                    model.module.eval()
                    with torch.no_grad():
                        model.module(torch.randn(100, 8))
                    model.module.train()
        meter.summary()
    assert [record.model_flops for record in meter.records] == [2 * 2 * 2 * 8 * 4] * 6
    assert meter.records[0].evaluation_s > 0


def test_a_frozen_part_that_a_loop_calls_itself_is_no_evaluation() -> None:
    encoder, head = nn.Linear(8, 4, bias=False).requires_grad_(False).eval(), nn.Linear(4, 2, bias=False)
    model = nn.Sequential(encoder, head)
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                model(torch.randn(2, 8)).sum().backward()
                with torch.no_grad():
                    features = encoder(torch.randn(3, 8))
                head(features).sum().backward()
        meter.summary()
    once = 2 * 2 * (8 * 4 + 2 * 4 * 2)  # the frozen layer forward only
    again = 2 * 3 * (8 * 4 + 2 * 4 * 2)
    assert [record.model_flops for record in meter.records] == [once + again] * 4
