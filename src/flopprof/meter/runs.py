"""A run, read from its records: restarts, what they repeated, how much of the time made progress. No torch."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from flopprof.meter.figures import Part, StepRecord, figures_of, flops_by_rate, timed
from flopprof.meter.records import Process, RunBetween, read
from flopprof.meter.summary import Summary, format_peaks, over_peak, row_of
from flopprof.meter.world import World, rank_report, world_of

_WINDOW = 100
_NAMED = 4


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's run, over all processes that worked on it.

    summary       of the steps that count: of one that was done again after a restart, the last time
    restarts      how often another process went on
    repeated      steps that were done again, because the checkpoint was older; None where that is not known
    wall_s        from the first start to the end of the last step
    goodput       the share of wall_s in which steps that count were made (at most, where it is not known which were
                  done again); one that was slow because it was the first,
                  compiled or counted, counts as long as the median step
    rows          where wall_s went, in seconds; they add up to it
    shared_data   other ranks read the same data
    """

    rank: int
    world_size: int
    summary: Summary
    restarts: int
    repeated: int | None
    wall_s: float
    goodput: float | None
    rows: dict[str, float]
    shared_data: bool = False

    def facts(self) -> list[tuple[str, str]]:
        """Labelled lines about restarts and time."""
        lines = []
        if self.restarts or self.repeated:
            times = "once" if self.restarts == 1 else f"{self.restarts} times"
            told = "not known how many steps were done again: each process numbers its own"
            again = told if self.repeated is None else f"{self.repeated} steps were done again"
            lines.append(("restarts", f"{times}; {again}"))
        if self.goodput is not None:
            most = "at most " if self.repeated is None else ""
            lines.append(("goodput", f"{most}{100 * self.goodput:.1f} % of {self.wall_s:.3f} s made progress"))
        return lines


def run_of(path: str | os.PathLike[str]) -> Run:
    """The run whose records are in a file. Raises UsageError where it holds none."""
    processes = read(path)
    made = [_Made(process) for process in processes]
    for place, later in enumerate(made):
        if later.process.start.own_count:
            continue
        first = min((record.step for record in later.kept), default=None)
        for earlier in made[:place]:
            earlier.repeat(first)
    own_count = any(process.start.own_count for process in processes[1:])
    start = processes[-1].start
    rows, wall = _rows(made)
    return Run(
        rank=start.rank,
        world_size=start.world_size,
        summary=_summary(made),
        restarts=len(processes) - 1,
        repeated=None if own_count else sum(len(each.repeated) for each in made),
        wall_s=wall,
        goodput=rows["steps"] / wall if wall > 0 and any(each.kept for each in made) else None,
        rows=rows,
        shared_data=start.shared_data,
    )


class _Made:
    """What one process made: the steps that count, those that were done again later, and seconds between both."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.kept, self.repeated = filled(process.records), list[StepRecord]()
        self.between, self.in_vain = [*process.between], list[RunBetween]()
        ends = [record.ended_at for record in process.records] + [line.ended_at for line in process.between]
        self.ended_at = max(ends, default=process.start.started_at)

    def repeat(self, first: int | None) -> None:
        """A later process begins with that step (None: makes none): what lies behind its start is done again."""
        if first is None:
            return
        self.repeated += [record for record in self.kept if record.step >= first]
        self.kept = [record for record in self.kept if record.step < first]
        self.in_vain += [line for line in self.between if line.step > first]
        self.between = [line for line in self.between if line.step <= first]

    def peaks(self, records: Sequence[StepRecord]) -> dict[str, float]:
        """By rate, those of the rates in these steps."""
        known = self.process.peaks
        return {rate: known[rate] for rate in flops_by_rate(records) if rate in known}

    def unknown(self, records: Sequence[StepRecord]) -> str:
        """Why these steps have no MFU; empty where they have."""
        known = self.process.peaks
        rates = [rate for rate, (model, _) in flops_by_rate(records).items() if model and rate not in known]
        return (self.process.reason or f"the peak of {', '.join(rates)} is not known.") if rates else ""

    def part(self, records: Sequence[StepRecord]) -> Part:
        """Some of its steps, and the peaks that it held them against."""
        return records, self.process.peaks.get, self.process.start.bytes_per_s


def world_of_runs(runs: Sequence[Run]) -> World | None:
    """All devices together, where these are different ranks of one run; None where they are not."""
    sizes = {run.world_size for run in runs}
    if len(runs) < 2 or len({run.rank for run in runs}) < len(runs) or len(sizes) > 1:
        return None
    reports = [rank_report(run.summary, rank=run.rank, shared_data=run.shared_data) for run in runs]
    return world_of(reports, size=sizes.pop())


def filled(records: Sequence[StepRecord]) -> list[StepRecord]:
    """One process's steps; those that were not counted have what one of the same signature has, that was."""
    known = {record.signature: record for record in records if record.flops is not None and record.signature >= 0}
    found = []
    for record in records:
        like = known.get(record.signature) if record.flops is None else None
        if like is not None:
            record = msgspec.structs.replace(
                record, flops=like.flops, bytes_moved=like.bytes_moved, uncounted=like.uncounted
            )
        found.append(record)
    return found


def _summary(made: Sequence[_Made]) -> Summary:
    last = made[-1].process
    records = [record for each in made for record in each.kept]
    used = [(each, steps) for each in made if (steps := timed(each.kept))]
    whole = figures_of([each.part(steps) for each, steps in used])
    window = figures_of(_latest([each.part(steps) for each, steps in used], _WINDOW))
    peaks, changed = _peaks(used)
    labels = dict.fromkeys(each.process.start.peak for each, _ in used)
    notes: list[str] = []
    if whole is None:
        notes.append("no step is timed: the first ones, and those that are counted, are in no figure.")
    elif whole.mfu is None:
        notes.append(f"no MFU: {next(filter(None, (each.unknown(steps) for each, steps in used)))}")
    elif any(each.process.start.peak_measured for each, _ in used):
        notes.append("MFU and HFU are of a peak that was measured, not of the vendor's.")
    if changed:
        notes.append(f"the peak changed: {changed}. Each step is held against that of the process that made it.")
    if whole is not None:
        notes += over_peak(whole, window)
    left_out: dict[str, int] = {}
    for record in records:
        reason = record.left_out[0] if record.left_out else "uncounted" if record.flops is None else ""
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
    calls = sum(record.uncounted for record in records)
    return Summary(
        device=last.start.device,
        peak=", then ".join(labels) or last.start.peak,
        peaks=peaks,
        peak_measured=any(each.process.start.peak_measured for each, _ in used),
        peaks_differ=bool(changed),
        attention="causal" if last.start.attention == "causal" else "full",
        steps=len(records),
        counted_steps=sum("counted" in record.left_out for record in records),
        signatures=len({record.signature for record in records}),
        left_out=left_out,
        flops=flops_by_rate(records),
        uncounted={"operators without a formula": calls} if calls else {},
        tokens=sum(record.tokens for record in records),
        samples=sum(record.samples for record in records),
        optimizer_steps=sum(record.optimizer_steps for record in records),
        whole=whole,
        window=window,
        rows={},
        notes=tuple(notes),
    )


def _latest(parts: Sequence[Part], steps: int) -> list[Part]:
    """So many of the latest steps."""
    found: list[Part] = []
    for records, peak, bytes_per_s in reversed(parts):
        if steps:
            some = records[-steps:]
            steps -= len(some)
            found.insert(0, (some, peak, bytes_per_s))
    return found


def _peaks(used: Sequence[tuple[_Made, Sequence[StepRecord]]]) -> tuple[dict[str, float], str]:
    """(the peaks by rate that are the same in all processes, as far as is printed; what each is where they are not)."""
    steps: dict[str, int] = {}
    values: dict[str, dict[str, float]] = {}
    for each, records in used:
        peaks = each.peaks(records)
        text = f"{format_peaks(peaks) or 'not known'} ({each.process.start.peak})"
        steps[text] = steps.get(text, 0) + len(records)
        for rate, peak in peaks.items():
            values.setdefault(rate, {})[format_peaks({rate: peak})] = peak
    same = {rate: next(iter(found.values())) for rate, found in values.items() if len(found) == 1}
    told = [f"{text} in {count} steps" for text, count in steps.items()]
    if len(told) > _NAMED:
        told[_NAMED:] = [f"and {len(told) - _NAMED} others"]
    return same, "" if len(same) == len(values) else ", ".join(told)


def _rows(made: Sequence[_Made]) -> tuple[dict[str, float], float]:
    """(seconds by where they went, all of them)."""
    kept = [record for each in made for record in each.kept]
    rows = dict.fromkeys(("steps", "slow_steps", "repeated", "data_wait", "evaluation"), 0.0)
    usual = statistics.median([record.step_time_s for record in timed(kept)] or [0.0])
    for record in kept:
        useful = record.step_time_s
        if record.left_out:
            useful = 0.0 if {"failed", "interrupted"} & {*record.left_out} else min(useful, usual)
        rows["steps"] += useful
        rows["slow_steps"] += record.step_time_s - useful
        rows["data_wait"] += record.data_wait_s
        rows["evaluation"] += record.evaluation_s
        for name, seconds in record.paused_s.items():
            rows[row_of(name)] = rows.get(row_of(name), 0.0) + seconds
    for each in made:
        for line in each.between:
            rows[row_of(line.between)] = rows.get(row_of(line.between), 0.0) + line.seconds
        rows["repeated"] += sum(map(_all_of, each.repeated)) + sum(line.seconds for line in each.in_vain)
    if len(made) > 1:
        rows["down"] = sum(
            max(later.process.start.started_at - earlier.ended_at, 0.0) for earlier, later in pairwise(made)
        )
    wall = made[-1].ended_at - made[0].process.start.started_at
    rows["other"] = max(wall - sum(rows.values()), 0.0)
    return rows, wall


def _all_of(record: StepRecord) -> float:
    return record.step_time_s + record.data_wait_s + record.evaluation_s + sum(record.paused_s.values())
