"""Texts in a batch: a choice tells steps apart, the names of its samples do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from flopprof import Meter

ROWS, IN, NARROW, WIDE = 4, 8, 2, 16


class TwoTasks(nn.Module):
    """One of two layers, as the batch says; a text `keep-N` keeps N of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"narrow": nn.Linear(IN, NARROW), "wide": nn.Linear(IN, WIDE)})

    def forward(self, batch: dict[str, Any], scale: float = 1.0) -> torch.Tensor:
        kept = int(batch.get("rows", f"keep-{ROWS}").removeprefix("keep-"))
        return self.layers[batch.get("task", "narrow")](batch["x"][:kept]) * scale


def flops(task: str = "narrow", rows: int = ROWS) -> int:
    """Forward and the gradient of the weight."""
    return 2 * 2 * rows * IN * {"narrow": NARROW, "wide": WIDE}[task]


def named(step: int, **told: Any) -> dict[str, Any]:
    return {"x": torch.randn(ROWS, IN), "file_name": [f"{step:04}-{i}.jpg" for i in range(ROWS)], **told}


def train(meter: Meter, model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> tuple[list[int | None], list[int]]:
    """FLOPs of each step, and which were counted."""
    for batch in batches:
        with meter.step():
            model(*batch).sum().backward()
    records = meter.records
    return [record.model_flops for record in records], [r.step for r in records if "counted" in r.left_out]


def measured(told: Callable[[int], tuple[Any, ...]], steps: int) -> tuple[list[int | None], list[int], tuple[str, ...]]:
    model = TwoTasks()
    with Meter(model) as meter:
        found = train(meter, model, map(told, range(steps)))
        return *found, meter.summary().notes


def test_names_of_samples_are_looked_at_no_more() -> None:
    """Seventeen batches that multiplied the same, each counted; the next one is counted for all that come then."""
    found, counted, notes = measured(lambda step: (named(step),), 60)
    assert found == [flops()] * 60
    assert counted == [*range(18)]
    assert notes[0].startswith("texts that the models are given do not all tell steps apart: more than 16 values ")


def test_a_task_beside_them_goes_on_telling_steps_apart() -> None:
    tasks = ["narrow", "wide", "wide"] * 40
    found, counted, _ = measured(lambda step: (named(step, task=tasks[step]),), 120)
    assert found == [flops(task) for task in tasks]
    assert len(counted) == 2 * 18  # of either task


def test_a_task_that_comes_late_is_another_one() -> None:
    tasks = ["narrow"] * 40 + ["wide"] * 40
    found, _, _ = measured(lambda step: (named(step, task=tasks[step]),), 80)
    assert found == [flops(task) for task in tasks]


def test_names_and_a_temperature() -> None:
    tasks = ["narrow", "wide"] * 40
    found, counted, notes = measured(lambda step: (named(step, task=tasks[step]), 1 / (1 + step)), 80)
    assert found == [flops(task) for task in tasks]
    assert len(counted) == 2 * 18
    assert any(note.startswith("floats or texts that the models are given do not all") for note in notes)


def test_a_text_that_says_how_much_is_multiplied() -> None:
    """Of each new value the step is counted, and one that was counted is known."""
    rows = [1 + step % ROWS for step in range(40)]
    found, counted, _ = measured(lambda step: ({"x": torch.randn(ROWS, IN), "rows": f"keep-{rows[step]}"},), 40)
    assert found == [flops(rows=kept) for kept in rows]
    assert counted == [*range(ROWS)]
    spelt = [f"keep-{'0' * (step // ROWS)}{rows[step]}" for step in range(40)]  # another text each time
    found, counted, notes = measured(lambda step: ({"x": torch.randn(ROWS, IN), "rows": spelt[step]},), 40)
    assert found == [flops(rows=kept) for kept in rows]
    assert counted == [*range(40)]
    assert any(note.startswith("texts that the models are given change what they multiply") for note in notes)


def test_a_resumed_loop_knows_which_texts_tell_nothing() -> None:
    model = TwoTasks()
    with Meter(model) as first:
        assert train(first, model, [(named(step),) for step in range(30)])[1] == [*range(18)]
        state = copy.deepcopy(first.state_dict())
    with Meter(model) as second:
        second.load_state_dict(state)
        assert train(second, model, [(named(step),) for step in range(30, 40)]) == ([flops()] * 40, [*range(18)])
