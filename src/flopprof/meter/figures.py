"""MFU and its relatives: arithmetic over steps that somebody else timed and counted. No torch, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import msgspec

Peak = Callable[[str], float | None]
# Steps, and what they are held against: FLOP/s by rate, and bytes per second.
Part = tuple[Sequence["StepRecord"], Peak, float | None]
# What a file of records says is held to these.
Count = Annotated[int, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(gt=0)]


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One step of a loop.

    step            its number in the whole run, restarts included
    ended_at        seconds since the epoch
    step_time_s     of the step itself: without data_wait_s, evaluation_s and paused_s
    signature       steps that have the same multiply the same
    flops           rate -> (model, hardware): FLOPs by dtype; for float32 convolutions `float32:convolution`
    left_out        why the step is in no figure that needs time: first, counted, compiled, interrupted, failed
    optimizer_steps how often an optimizer stepped: 0 where one was skipped
    effective_tokens  without padding; None where no attention mask was seen
    """

    step: Count
    ended_at: float
    step_time_s: float
    signature: int = 0
    flops: dict[str, tuple[Count, Count]] | None = None
    bytes_moved: Count = 0
    uncounted: Count = 0
    tokens: Count = 0
    effective_tokens: Count | None = None
    samples: Count = 0
    calls: Count = 0
    optimizer_steps: Count = 0
    data_wait_s: float = 0.0
    evaluation_s: float = 0.0
    paused_s: dict[str, float] = {}
    left_out: tuple[str, ...] = ()

    @property
    def model_flops(self) -> int | None:
        """Forward and backward; None where the step was not counted."""
        return None if self.flops is None else sum(model for model, _ in self.flops.values())

    @property
    def hardware_flops(self) -> int | None:
        """Everything executed; None where the step was not counted."""
        return None if self.flops is None else sum(executed for _, executed in self.flops.values())


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What timed steps achieved. Fractions are of the dense peak; None is what is not known."""

    steps: int
    time_s: float
    model_flops: int
    hardware_flops: int
    mfu: float | None
    hfu: float | None
    mbu: float | None
    model_flops_per_s: float
    hardware_flops_per_s: float
    tokens_per_s: float | None
    effective_tokens_per_s: float | None
    samples_per_s: float | None
    step_time_s: Percentiles


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of step times in seconds, by linear interpolation between the two nearest."""

    least: float
    p10: float
    median: float
    p90: float
    p99: float
    most: float


def timed(records: Iterable[StepRecord]) -> list[StepRecord]:
    """The steps that figures are made of: counted ones whose time is that of the loop's own work."""
    return [record for record in records if record.flops is not None and not record.left_out]


def figures(records: Sequence[StepRecord], peak: Peak, bytes_per_s: float | None = None) -> Figures | None:
    """The figures of these steps together; None where there is none, or no time passed."""
    return figures_of([(records, peak, bytes_per_s)])


def figures_of(parts: Sequence[Part]) -> Figures | None:
    """As `figures`, of steps that are not all held against the same: an ideal time is the sum of those of the parts."""
    parts = [part for part in parts if part[0]]
    records = [record for some, _, _ in parts for record in some]
    time_s = sum(record.step_time_s for record in records)
    if not records or time_s <= 0:
        return None
    tables = [(flops_by_rate(some), peak) for some, peak, _ in parts]
    tokens = sum(record.tokens for record in records)
    effective = [record.effective_tokens for record in records if record.effective_tokens is not None]
    samples = sum(record.samples for record in records)
    model, hardware = (sum(row[i] for table, _ in tables for row in table.values()) for i in (0, 1))
    return Figures(
        steps=len(records),
        time_s=time_s,
        model_flops=model,
        hardware_flops=hardware,
        mfu=_share([_ideal(table, 0, peak) for table, peak in tables], time_s),
        hfu=_share([_ideal(table, 1, peak) for table, peak in tables], time_s),
        mbu=_share([_moving(some, limit) for some, _, limit in parts], time_s),
        model_flops_per_s=model / time_s,
        hardware_flops_per_s=hardware / time_s,
        tokens_per_s=tokens / time_s if tokens else None,
        effective_tokens_per_s=sum(effective) / time_s if len(effective) == len(records) and tokens else None,
        samples_per_s=samples / time_s if samples else None,
        step_time_s=percentiles([record.step_time_s for record in records]),
    )


def flops_by_rate(records: Iterable[StepRecord]) -> dict[str, tuple[int, int]]:
    """rate -> (model, hardware) FLOPs of all of them."""
    table: dict[str, tuple[int, int]] = {}
    for record in records:
        for rate, (model, hardware) in (record.flops or {}).items():
            before = table.get(rate, (0, 0))
            table[rate] = (before[0] + model, before[1] + hardware)
    return table


def ideal_time_s(flops: dict[str, int], peak: Peak) -> float | None:
    """How long the work takes at the peak of each rate, one after the other; None where a peak is not known."""
    seconds = 0.0
    for rate, count in flops.items():
        if count:
            limit = peak(rate)
            if limit is None:
                return None
            seconds += count / limit
    return seconds


def _ideal(flops: dict[str, tuple[int, int]], which: int, peak: Peak) -> float | None:
    return ideal_time_s({rate: row[which] for rate, row in flops.items()}, peak)


def _moving(records: Iterable[StepRecord], bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else sum(record.bytes_moved for record in records) / bytes_per_s


def _share(ideal: Sequence[float | None], time_s: float) -> float | None:
    """None where one of the times is not known."""
    known = [seconds for seconds in ideal if seconds is not None]
    return sum(known) / time_s if len(known) == len(ideal) else None


def percentiles(values: Sequence[float]) -> Percentiles:
    """Of at least one value."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Percentiles(least=ordered[0], p10=at(0.1), median=at(0.5), p90=at(0.9), p99=at(0.99), most=ordered[-1])
