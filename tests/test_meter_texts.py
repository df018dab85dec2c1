"""Texts in a batch: a choice tells steps apart, the names of its samples do not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
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
        kept = int(batch.get("rows", f"keep-{len(batch['x'])}").removeprefix("keep-"))
        kept = round(batch.get("shares", [1.0])[0] * kept)
        task = next((sample["task"] for sample in batch.get("samples", ()) if "task" in sample), "narrow")
        return self.layers[batch.get("task", task)](batch["x"][:kept]) * scale


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


@dataclass
class Sample:
    """What detection frameworks keep of an image."""

    path: str
    flip: bool
    direction: str | None
    scale: float


def flipped(numbers: random.Random) -> Sample:
    flip = numbers.random() < 0.5
    return Sample(f"{numbers.random()}"[:20], flip, "horizontal" if flip else None, numbers.choice([0.5, 0.75, 1.0]))


OF_SAMPLES: dict[str, Callable[[random.Random], Any]] = {
    "labels": lambda numbers: numbers.choice(["cat", "dog", "horse"]),
    "texts, some with spaces": lambda numbers: numbers.choice(["cat%d", "a cat %d"]) % numbers.randrange(999),
    "a text or None": lambda numbers: numbers.choice([None, f"n{numbers.randrange(9999)}"]),
    "flags": lambda numbers: numbers.random() < 0.5,
    "one of few floats": lambda numbers: numbers.randrange(10) / 10,
    "tags, any number": lambda numbers: [f"t{numbers.randrange(9)}" for _ in range(numbers.randint(0, 3))],
    "fields": lambda numbers: {"id": f"{numbers.randrange(9999)}", "source": numbers.choice(["web", "books"])},
    "fields, not always all": lambda numbers: {key: "yes" for key in "abcd" if numbers.random() < 0.5},
    "objects": flipped,
}


@pytest.mark.parametrize("kind", OF_SAMPLES)
@pytest.mark.parametrize("sequence", [list, tuple])
def test_what_each_sample_has_tells_nothing_once_it_made_no_difference(kind: str, sequence: type) -> None:
    """Choices of eight samples hardly come twice: they are looked at together."""
    numbers = random.Random(0)
    found, counted, _ = measured(
        lambda _: ({"x": torch.randn(ROWS, IN), "told": sequence(OF_SAMPLES[kind](numbers) for _ in range(8))},), 100
    )
    assert found == [flops()] * 100
    assert len(counted) <= 25
    assert len([step for step in counted if step >= 30]) <= 3  # a float beyond those that were counted


@pytest.mark.parametrize("choices", [("web", "books", "code"), (0.25, 0.5, 1.0)])
def test_choices_of_many_arguments_that_made_no_difference(choices: tuple[Any, ...]) -> None:
    """Six choices of three hardly come twice: of those seen, more than sixteen that were equal speak for the others."""
    numbers = random.Random(0)

    def batch(_: int) -> tuple[dict[str, Any]]:
        return ({"x": torch.randn(ROWS, IN), **{f"choice {i}": numbers.choice(choices) for i in range(6)}},)

    found, counted, _ = measured(batch, 100)
    assert found == [flops()] * 100
    assert len(counted) <= 22
    assert not [step for step in counted if step >= 40]


def test_a_choice_that_was_not_seen_before_is_counted() -> None:
    """Beside others that made no difference; and from then on it is told."""
    numbers = random.Random(0)
    tasks = ["narrow"] * 40 + [numbers.choice(["narrow", "wide"]) for _ in range(80)]

    def batch(step: int) -> tuple[dict[str, Any]]:
        sources = {f"source {i}": numbers.choice(["web", "books", "code"]) for i in range(6)}
        return ({"x": torch.randn(ROWS, IN), "task": tasks[step], **sources},)

    found, counted, _ = measured(batch, 120)
    assert found == [flops(task) for task in tasks]
    assert len(counted) <= 50


def test_names_in_batches_of_any_size() -> None:
    numbers = random.Random(0)
    rows = [numbers.randint(1, 8) for _ in range(100)]
    found, counted, _ = measured(
        lambda step: ({"x": torch.randn(rows[step], IN), "names": [f"{step}-{i}" for i in range(rows[step])]},), 100
    )
    assert found == [flops(rows=count) for count in rows]
    assert len(counted) <= 25


def test_names_beside_sizes_that_hardly_come_twice() -> None:
    """Counts of different sizes are alike where one form tells them."""
    numbers = random.Random(0)
    rows = [numbers.randint(1, 500) for _ in range(150)]
    found, counted, _ = measured(
        lambda step: ({"x": torch.randn(rows[step], IN), "names": [f"{step}-{i}" for i in range(4)]},), 150
    )
    assert found == [flops(rows=count) for count in rows]
    assert len(counted) <= 50
    assert len([step for step in counted if step >= 100]) <= 2


def test_a_task_of_the_samples_tells_steps_apart() -> None:
    tasks = ["narrow"] * 40 + ["wide", "narrow"] * 30

    def batch(step: int) -> tuple[dict[str, Any]]:
        return ({"x": torch.randn(ROWS, IN), "samples": [{"id": f"{step}", "task": tasks[step]} for _ in range(4)]},)

    found, counted, _ = measured(batch, 100)
    assert found == [flops(task) for task in tasks]
    assert len(counted) == 2 * 18


def test_tasks_of_the_samples_that_differ_always_tell() -> None:
    """The first sample's task is that of the step: each combination is another one."""
    numbers = random.Random(0)
    tasks = [[numbers.choice(["narrow", "wide"]) for _ in range(4)] for _ in range(120)]

    def batch(step: int) -> tuple[dict[str, Any]]:
        return ({"x": torch.randn(ROWS, IN), "samples": [{"task": task} for task in tasks[step]]},)

    found, counted, _ = measured(batch, 120)
    assert found == [flops(first) for first, *_ in tasks]
    assert len(counted) == 16


def test_floats_of_the_samples_that_fall_are_counted_now_and_then() -> None:
    """Of all of them the least and the greatest are held against those that were counted."""
    shares = [[1 - step / 400, 0.5 - step / 400] for step in range(100)]
    found, counted, notes = measured(lambda step: ({"x": torch.randn(ROWS, IN), "shares": shares[step]},), 100)
    expected = [flops(rows=round(share * ROWS)) for share, _ in shares]
    assert found[:51] == expected[:51]
    assert [told for told in found[75:] if told is not None] == expected[75:][: 25 - found[75:].count(None)]
    assert counted[:18] == [*range(18)]
    assert any("may have been taken for others" in note for note in notes)
