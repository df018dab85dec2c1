"""A run, read from its records: restarts, what they repeated, how much of the time made progress. No torch."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

import msgspec

from flopprof.meter.figures import StepRecord, figures, flops_by_rate, timed
from flopprof.meter.records import Process, read
from flopprof.meter.summary import Summary, over_peak
from flopprof.meter.world import World, rank_report, world_of

_WINDOW = 100


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's run, over all processes that worked on it.

    summary       of the steps that count: of one that was done again after a restart, the last time
    restarts      how often another process went on
    repeated      steps that were done again, because the checkpoint was older
    wall_s        from the first start to the end of the last step
    goodput       the share of wall_s in which steps that count were made; one that was slow because it was the first,
                  compiled or counted, counts as long as the median step
    rows          where wall_s went, in seconds; they add up to it
    """

    rank: int
    world_size: int
    summary: Summary
    restarts: int
    repeated: int
    wall_s: float
    goodput: float | None
    rows: dict[str, float]

    def facts(self) -> list[tuple[str, str]]:
        """Labelled lines about restarts and time."""
        lines = []
        if self.restarts or self.repeated:
            times = "once" if self.restarts == 1 else f"{self.restarts} times"
            lines.append(("restarts", f"{times}; {self.repeated} steps were done again"))
        if self.goodput is not None:
            lines.append(("goodput", f"{100 * self.goodput:.1f} % of {self.wall_s:.3f} s made progress"))
        return lines


def run_of(path: str | os.PathLike[str]) -> Run:
    """The run whose records are in a file. Raises UsageError where it holds none."""
    processes = read(path)
    known = [filled(process.records) for process in processes]
    kept: list[StepRecord] = []
    repeated: list[StepRecord] = []
    for records in known:
        first = min((record.step for record in records), default=None)
        if first is not None:
            repeated += [record for record in kept if record.step >= first]
            kept = [record for record in kept if record.step < first]
        kept += records
    start = processes[-1].start
    rows, wall = _rows(processes, known, kept, repeated)
    return Run(
        rank=start.rank,
        world_size=start.world_size,
        summary=_summary(processes, kept),
        restarts=len(processes) - 1,
        repeated=len(repeated),
        wall_s=wall,
        goodput=rows["steps"] / wall if wall > 0 and kept else None,
        rows=rows,
    )


def world_of_runs(runs: Sequence[Run]) -> World | None:
    """All devices together, where these are different ranks of one run; None where they are not."""
    sizes = {run.world_size for run in runs}
    if len(runs) < 2 or len({run.rank for run in runs}) < len(runs) or len(sizes) > 1:
        return None
    return world_of([rank_report(run.summary, rank=run.rank) for run in runs], size=sizes.pop())


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


def _summary(processes: Sequence[Process], records: Sequence[StepRecord]) -> Summary:
    last = processes[-1]
    peaks: dict[str, float] = {}
    for process in processes:
        peaks |= process.peaks
    usable = timed(records)
    whole = figures(usable, peaks.get, last.start.bytes_per_s)
    notes: list[str] = []
    if whole is None:
        notes.append("no step is timed: the first ones, and those that are counted, are in no figure.")
    elif whole.mfu is None:
        notes.append(f"no MFU: {last.reason or 'the peak of ' + ', '.join(flops_by_rate(usable)) + ' is not known.'}")
    elif last.start.peak_measured:
        notes.append("MFU and HFU are of a peak that was measured, not of the vendor's.")
    if whole is not None:
        notes += over_peak(whole)
    left_out: dict[str, int] = {}
    for record in records:
        reason = record.left_out[0] if record.left_out else "uncounted" if record.flops is None else ""
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
    calls = sum(record.uncounted for record in records)
    return Summary(
        device=last.start.device,
        peak=last.start.peak,
        peaks={rate: peaks[rate] for rate in flops_by_rate(usable) if rate in peaks},
        peak_measured=last.start.peak_measured,
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
        window=figures(usable[-_WINDOW:], peaks.get, last.start.bytes_per_s),
        rows={},
        notes=tuple(notes),
    )


def _rows(
    processes: Sequence[Process],
    filled: Sequence[Sequence[StepRecord]],
    kept: Sequence[StepRecord],
    repeated: Sequence[StepRecord],
) -> tuple[dict[str, float], float]:
    """(seconds by where they went, all of them)."""
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
            rows[name] = rows.get(name, 0.0) + seconds
    for record in repeated:
        rows["repeated"] += _all_of(record)
    ends = [max((record.ended_at for record in records), default=None) for records in filled]
    down, before = 0.0, None
    for process, end in zip(processes, ends, strict=True):
        if before is not None:
            down += max(process.start.started_at - before, 0.0)
        before = end if end is not None else process.start.started_at
    if len(processes) > 1:
        rows["down"] = down
    wall = (before or 0.0) - processes[0].start.started_at
    rows["other"] = max(wall - sum(rows.values()), 0.0)
    return rows, wall


def _all_of(record: StepRecord) -> float:
    return record.step_time_s + record.data_wait_s + record.evaluation_s + sum(record.paused_s.values())
