"""What a model is given: numbers, slices and boundaries tell steps apart, however they are handed over."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections import UserDict
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from flopprof import Meter
from flopprof.meter.arguments import arguments
from flopprof.meter.signature import Root
from wrapped import Wrapper

ROW = 3 * 2 * 8 * 4  # of nn.Linear(8, 4) over one row that wants a gradient: forward, and both of the backward


class Kept(nn.Module):
    """A layer over as many of eight rows as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *told: Any, **named: Any) -> torch.Tensor:
        (value,) = (*told, *named.values())
        return self.layer(x[rows_of(value)])


class Way(enum.Enum):
    """Two ways."""

    HALF = "half"
    ALL = "all"


def rows_of(value: Any) -> slice:
    if isinstance(value, slice):
        return value
    if isinstance(value, range):
        return slice(value.start, value.stop, value.step)
    if isinstance(value, Way):
        return slice(4 if value is Way.HALF else 8)
    if isinstance(value, np.ndarray):
        return slice(len(value))
    if isinstance(value, np.bool_):
        return slice(8 if value else 3)
    if isinstance(value, np.integer):
        return slice(int(value))
    return slice(int(8 * abs(value)))


def metered(values: Iterable[Any], *, named: bool = False, model: nn.Module | None = None) -> list[tuple[int, bool]]:
    """(rows that were multiplied, was it counted) of a step for each value."""
    model = model or Kept()
    with Meter(model) as meter:
        for value in values:
            with meter.step():
                x = torch.randn(8, 8, requires_grad=True)
                (model(x, value=value) if named else model(x, value)).sum().backward()
        return [((record.model_flops or 0) / ROW, "counted" in record.left_out) for record in meter.records]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("more", "less", "rows"),
    [
        (1.0, 0.5, (8, 4)),
        (np.float64(1), np.float64(0.5), (8, 4)),
        (np.float32(1), np.float32(0.5), (8, 4)),
        (np.int64(6), np.int64(2), (6, 2)),
        (np.bool_(True), np.bool_(False), (8, 3)),
        (1 + 0j, 0.5j, (8, 4)),
        (Fraction(1), Fraction(1, 2), (8, 4)),
        (slice(0, 8), slice(0, 2), (8, 2)),
        (slice(0, 8), slice(0, 8, 2), (8, 4)),
        (slice(None), slice(6, None), (8, 2)),
        (range(8), range(0, 8, 4), (8, 2)),
        (Way.ALL, Way.HALF, (8, 4)),
        (np.zeros(7), np.zeros(5), (7, 5)),
    ],
    ids=str,
)
def test_values_tell_steps_apart(more: Any, less: Any, rows: tuple[int, int], named: bool) -> None:
    """Each is counted once, and both are known from then on."""
    found = metered([more, less] * 3, named=named)
    assert [row for row, _ in found] == [*rows] * 3
    assert [counted for _, counted in found] == [True, True, False, False, False, False]


def test_numbers_of_every_make_are_the_same() -> None:
    def told(*args: Any) -> Any:
        return arguments(args, {})

    assert told(np.float64(0.5)) == told(0.5) == told(Fraction(1, 2))
    assert told(np.int32(7)) == told(7)
    assert told(np.bool_(True)) == told(True)
    assert told(float("nan")) == told(float("nan"))
    assert told(0.5) != told(0.25)
    assert len({told(value) for value in (1.0, 1, True, 1j, "1.0", None, slice(1), range(1))}) == 8
    assert told("any float") == told("another text")


# --- floats that change in every step --------------------------------------------------------------------------------
def notes(model: nn.Module, values: Iterable[Any], **options: Any) -> tuple[str, ...]:
    with Meter(model, peak=1e9, **options) as meter:
        for value in values:
            with meter.step():
                model(torch.randn(8, 8), value).sum().backward()
        return meter.summary().notes


class Scaled(nn.Module):
    """A layer whose result is scaled: what it multiplies is always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, by: Any) -> torch.Tensor:
        return self.layer(x) * (by if isinstance(by, float) else by["by"])


def test_a_float_that_always_changes_is_looked_at_no_more() -> None:
    """Seventeen values that multiplied the same, each counted; the next one is counted for all that come then."""
    falling = [1.0 / step for step in range(1, 60)]
    found = metered(falling, model=Scaled())
    assert {row for row, _ in found} == {8}
    assert [step for step, (_, counted) in enumerate(found) if counted] == [*range(18)]
    assert metered(({"by": value} for value in falling), model=Scaled()) == found
    (note,) = notes(Scaled(), falling)
    assert note.startswith("floats that the models are given do not all tell steps apart: more than 16 values ")
    assert not any("floats" in note for note in notes(Scaled(), falling[:17]))


def test_a_float_that_matters_is_always_looked_at() -> None:
    """Every second one keeps a row less than the others; after sixteen values each one is counted still."""
    values = [(8 - step % 2) / 8 + step / 10000 for step in range(40)]
    found = metered(values)
    assert [row for row, _ in found] == [8 - step % 2 for step in range(40)]
    assert all(counted for _, counted in found)
    (note, *_) = notes(Kept(), values)
    assert note.startswith("floats that the models are given change what they multiply")


def test_a_float_that_grows_steadily_is_counted_now_and_then() -> None:
    """At first 0 to 17; then wherever it is further from those counted than they are from each other."""
    found = metered((float(step) for step in range(150)), model=Scaled())
    assert {row for row, _ in found} == {8}
    assert [step for step, (_, counted) in enumerate(found) if counted] == [*range(18), 33, 67, 135]


def test_a_float_that_matters_late() -> None:
    """Seven rows, and six from step 26 on: seen in the next count, that of step 33, and heeded from then on."""
    values = [(7.5 - step / 50) / 8 for step in range(50)]
    found = metered(values)
    assert [row for row, _ in found] == [7] * 33 + [6] * 17
    assert [step for step, (_, counted) in enumerate(found) if counted] == [*range(18), *range(33, 50)]
    (note, *_) = notes(Kept(), values)
    assert note.startswith("floats that the models are given change what they multiply")
    assert note.endswith("Some steps before that was found may have been taken for others.")


def test_a_flag_beside_a_float_that_always_changes() -> None:
    """The one goes on telling steps apart; the other is learnt to be of no account for either of its values."""

    class KeptAndScaled(Kept):
        def forward(self, x: torch.Tensor, *told: Any, **named: Any) -> torch.Tensor:
            (keep, by) = told[0]
            return super().forward(x, keep) * by

    values = [((0.5, 1.0)[step % 2], 1.0 / (step + 1)) for step in range(60)]
    found = metered(values, model=KeptAndScaled())
    assert [row for row, _ in found] == [(4, 8)[step % 2] for step in range(60)]
    assert [step for step, (_, counted) in enumerate(found) if counted] == [*range(36)]


def test_a_resumed_loop_has_learnt_it() -> None:
    model = Scaled()

    def train(meter: Meter, steps: Iterable[int]) -> list[int]:
        for step in steps:
            with meter.step():
                model(torch.randn(8, 8), 1 / (1 + step)).sum().backward()
        return [record.step for record in meter.records if "counted" in record.left_out]

    with Meter(model) as first:
        assert train(first, range(30)) == [*range(18)]
        state = first.state_dict()
    with Meter(model) as second:
        second.load_state_dict(state)
        assert train(second, range(30, 40)) == [*range(18)]
        assert any("floats" in note for note in second.summary().notes)


# --- where packed sequences begin ------------------------------------------------------------------------------------
class Packed(nn.Module):
    """Attention over each sequence of a packed batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 24)

    def forward(self, x: Any, cu_seqlens: Any = None) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            batch = x if isinstance(x, dict | UserDict) else vars(x)
            x, cu_seqlens = batch["x"], batch["cu_seqlens"]
        q, k, v = self.layer(x).chunk(3, -1)
        parts = [
            scaled_dot_product_attention(*(part[None, None, start:end] for part in (q, k, v)))
            for start, end in itertools.pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, 2)


@dataclasses.dataclass
class Batch:
    """A packed batch."""

    x: torch.Tensor
    cu_seqlens: torch.Tensor


def packed(*lengths: int) -> int:
    """16 tokens through nn.Linear(8, 24), forward and weight gradient; 4 n^2 d of attention forward, twice back."""
    return 2 * 2 * 16 * 8 * 24 + sum(3 * 4 * n * n * 8 for n in lengths)


def test_packed_by_hand() -> None:
    assert (packed(8, 8), packed(1, 15)) == (24576, 33984)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, cuts: model(x, cu_seqlens=cuts),
        lambda model, x, cuts: model(x, cuts),
        lambda model, x, cuts: model({"x": x, "cu_seqlens": cuts}),
        lambda model, x, cuts: model(UserDict(x=x, cu_seqlens=cuts)),
        lambda model, x, cuts: model(Batch(x, cuts)),
    ],
    ids=["keyword", "position", "dict", "mapping", "dataclass"],
)
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["bare", "wrapped"])
def test_where_sequences_begin(call: Callable[..., Any], wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Packed())
    with Meter(model) as meter:
        for step in range(6):
            with meter.step():
                cuts = torch.tensor([0, 1 if step % 2 else 8, 16])
                call(model, torch.randn(16, 8), cuts).sum().backward()
        found = [record.model_flops for record in meter.records]
    assert found == [packed(8, 8), packed(1, 15)] * 3


class Flash(Packed):
    """A transformers model of that attention, as far as its config says."""

    class config:
        """As transformers has it."""

        _attn_implementation = "flash_attention_2"


def test_names_and_configs_are_looked_for_inside_wrappers() -> None:
    for model in (Flash(), Wrapper(Flash()), Wrapper(Wrapper(Flash())), compiled(Flash()), Wrapper(compiled(Flash()))):
        root = Root(model, 0)
        assert (root.flash, root.names, root.bounds_at) == (True, ("x", "cu_seqlens"), 1)
    plain = Root(Wrapper(nn.Linear(2, 2)), 0)
    assert (plain.flash, plain.names) == (None, ("input",))
    assert plain.bounds_at > 1 << 30
