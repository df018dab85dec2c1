"""The steps that are past: their records, what they add up to, and the file that they are appended to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from flopprof.errors import UsageError
from flopprof.meter.conventions import Teller, teller
from flopprof.meter.figures import Figures, StepRecord, figures, flops_by_rate, timed
from flopprof.meter.peaks import Peaks
from flopprof.meter.places import Done
from flopprof.meter.ranks import path_of_rank, place_of_process, shares_data
from flopprof.meter.recorder import Recorder
from flopprof.meter.records import SCHEMA, RecordWriter, RunBetween, RunPeaks, RunStart
from flopprof.meter.steps import NO_PAUSES, OpenStep
from flopprof.meter.summary import Summary, over_peak, row_of
from flopprof.meter.work import Work
from flopprof.profile import Attention

_MOST_KINDS = 1 << 14

Clock = Callable[[], float]


class History:
    """Records in the order of their steps."""

    def __init__(
        self,
        recorder: Recorder,
        peaks: Peaks,
        *,
        device: str,
        attention: Attention,
        convention: str | None,
        window: int,
        path: str | os.PathLike[str] | None,
        epoch: tuple[Clock, Clock],
    ) -> None:
        self.records: list[StepRecord] = []
        self.peaks = peaks
        self.device = device
        self.window = window
        self._recorder = recorder
        self._attention: Attention = attention
        self._teller: Teller | None = None if convention is None else teller(convention)
        if path is not None and not Path(path).parent.is_dir():
            raise UsageError(
                f"cannot write records to {str(path)!r}: the directory {str(Path(path).parent)!r} is missing."
            )
        self._path = path
        wall, clock = epoch
        self._epoch = wall() - clock()  # seconds since 1970 at the clock's zero
        self._started = wall()
        self._writer: RecordWriter | None = None
        self._written: set[str] = set()
        self._held: list[RunBetween] = []  # until there is a file to write them to
        self._signatures: dict[tuple[Done, ...], int] = {}
        self._unknown: dict[int, tuple[Done, ...]] = {}  # steps without a count so far, by their place in records
        self._kinds: dict[tuple[Done, ...], _Kind] = {}
        self._kinds_seen = self._corrections = 0
        self._uncounted: dict[str, int] = {}
        self._rows: dict[str, float] = {}
        self._energy = _Energy(device)
        self.own_count = False  # which step it is, nobody says

    @property
    def at_once(self) -> bool:
        """Must the record of each step be made when it ends: for the file, or to know where energy is counted from?"""
        return self._path is not None or self._energy.starts

    def move(self, device: str) -> None:
        """The models are on another device than was thought."""
        if device != self.device:
            self.device = device
            self.peaks = self.peaks.on(device)
            self._energy = _Energy(device)

    def knows(self, segments: tuple[Done, ...]) -> bool:
        """Was there a whole step of these segments?"""
        return segments in self._signatures

    def passed(self, name: str, seconds: float, *, step: int, at: float | None = None) -> None:
        """Time between steps, until `at` of the host's clock (None: now). step: the number of the next one."""
        self._rows[name] = self._rows.get(name, 0.0) + seconds
        if self._path is not None and seconds:
            ended = self._epoch + (self._recorder.clock() if at is None else at)
            self._held.append(RunBetween(between=name, seconds=seconds, step=step, ended_at=ended))
            self._write_held()

    def _evaluated(self, *, wait: bool) -> None:
        """Take in the evaluations between steps that are over."""
        for seconds, step, at in self._recorder.between.over(self._recorder.timer, wait=wait):
            self.passed("evaluation", seconds, step=step, at=at)

    def _evaluation_s(self) -> float:
        """Of evaluations between steps, in all: that under way until now."""
        self._evaluated(wait=True)
        return self._rows.get("evaluation", 0.0) + self._recorder.between.under_way_s(self._recorder.timer)

    # --- records -----------------------------------------------------------------------------------------------------
    def add(self, step: OpenStep, sizes: tuple[Any, Any], *, wait: bool) -> bool:
        """The record of a step; False where the device is not past it yet."""
        end = step.end
        if type(end) is float and not step.spans:
            whole, evaluation, paused = end - step.start, 0.0, NO_PAUSES
        else:
            times = step.times(self._recorder.timer, wait=wait)
            if times is None:
                return False
            whole, evaluation, paused = times
            whole = max(whole - evaluation - sum(paused.values()), 0.0)
        kind = self._kinds.get(step.segments)
        if kind is None or step.left_out or step.unseen or self._corrections != self._recorder.tracker.corrections:
            kind = self._kind(step)
        tokens, samples = step.tokens, step.samples
        if not tokens and not samples:
            tokens, samples = step.other_tokens, step.other_samples
        record = StepRecord(
            step=step.number,
            ended_at=self._epoch + step.host_end,
            step_time_s=whole,
            signature=kind.number,
            flops=kind.flops,
            bytes_moved=kind.bytes_moved,
            uncounted=kind.calls,
            tokens=sizes[0] if isinstance(sizes[0], int) else tokens,
            effective_tokens=self._recorder.effective_tokens(step) if sizes[0] is None and step.unpadded else None,
            samples=sizes[1] if isinstance(sizes[1], int) else samples,
            calls=step.calls,
            optimizer_steps=step.optimizer_steps,
            data_wait_s=step.data_wait_s + paused.pop("data_wait", 0.0),
            evaluation_s=evaluation,
            paused_s=paused,
            left_out=tuple(dict.fromkeys(step.left_out)) if step.left_out else (),
        )
        self.records.append(record)
        if kind.uncounted:
            self._note_uncounted(kind.uncounted)
        if self._path is not None:
            self._write(record)
        if self._energy.starts and not record.left_out:
            self._energy.start()
        return True

    def _kind(self, step: OpenStep) -> _Kind:
        """What steps like this have in common."""
        if self._corrections != self._recorder.tracker.corrections:
            self._corrections = self._recorder.tracker.corrections
            self._kinds.clear()
        if "failed" in step.left_out:
            return _Kind(-1)
        segments = step.segments
        if "interrupted" in step.left_out:
            number = self._signatures.get(segments, -1)
        else:
            number = self._signatures.setdefault(segments, self._kinds_seen)
            self._kinds_seen = max(self._kinds_seen, number + 1)
        if step.unseen:
            return _Kind(number)
        work = self._recorder.work(segments)
        if work is None:
            self._unknown[len(self.records)] = segments
            return _Kind(number)
        made = _Kind(number, *_told(work))
        if number >= 0:
            if len(self._kinds) > _MOST_KINDS:
                self._kinds.clear()
            self._kinds[segments] = made
        return made

    def _note_uncounted(self, uncounted: Mapping[str, int]) -> None:
        for op, calls in uncounted.items():
            self._uncounted[op] = self._uncounted.get(op, 0) + calls

    def fill(self) -> None:
        """Count steps that were not, by another one of the same signature that was since."""
        for place, segments in list(self._unknown.items()):
            work = self._recorder.work(segments)
            if work is not None:
                flops, moved, calls, uncounted = _told(work)
                self._note_uncounted(uncounted)
                self.records[place] = msgspec.structs.replace(
                    self.records[place], flops=flops, bytes_moved=moved, uncounted=calls
                )
                del self._unknown[place]

    def _write(self, record: StepRecord) -> None:
        assert self._path is not None
        if self._writer is None:
            rank, size = place_of_process()
            start = RunStart(
                rank=rank,
                world_size=size,
                shared_data=size > 1 and shares_data(self._recorder.models),
                own_count=self.own_count,
                started_at=self._started,
                schema=SCHEMA,
                attention=self._attention,
                device=self.device,
                peak=self.peaks.label,
                peak_measured=self.peaks.measured,
                bytes_per_s=self.peaks.bytes_per_s,
                reason=self.peaks.reason,
            )
            self._writer = RecordWriter(path_of_rank(self._path, rank, size), start)
        new = {rate for rate in record.flops or {} if rate not in self._written}
        if new:
            self._written |= new
            self._writer.write(RunPeaks(peaks=self.peaks.describe(new), reason=self.peaks.reason))
        self._evaluated(wait=False)
        self._write_held()
        self._writer.write(record)

    def _write_held(self) -> None:
        if self._writer is not None:
            for line in self._held:
                self._writer.write(line)
            self._held.clear()

    # --- what they add up to -----------------------------------------------------------------------------------------
    def latest(self, steps: int | None = None) -> Figures | None:
        """Figures of the latest timed steps."""
        wanted = steps or self.window
        usable: list[StepRecord] = []
        for record in reversed(self.records):
            if record.flops is not None and not record.left_out:
                usable.append(record)
                if len(usable) == wanted:
                    break
        return figures(usable, self.peaks.flops_per_s, self.peaks.bytes_per_s)

    def summary(self) -> Summary:
        """Everything so far."""
        self.fill()
        records = self.records
        usable = timed(records)
        limit, bandwidth = self.peaks.flops_per_s, self.peaks.bytes_per_s
        whole, window = (figures(some, limit, bandwidth) for some in (usable, usable[-self.window :]))
        left_out: dict[str, int] = {}
        for record in records:
            reason = record.left_out[0] if record.left_out else "uncounted" if record.flops is None else ""
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
        energy_j, energy_tokens = self._energy.read(records)
        told = None
        if self._teller is not None:
            told = self._teller.tell(self._recorder.models, usable, limit)
        return Summary(
            device=self.device,
            peak=self.peaks.label,
            peaks=self.peaks.describe(flops_by_rate(usable)),
            peak_measured=self.peaks.measured,
            attention=self._attention,
            steps=len(records),
            counted_steps=sum("counted" in record.left_out for record in records),
            signatures=self._kinds_seen,
            left_out=left_out,
            flops=flops_by_rate(records),
            uncounted=dict(self._uncounted),
            tokens=sum(record.tokens for record in records),
            samples=sum(record.samples for record in records),
            optimizer_steps=sum(record.optimizer_steps for record in records),
            whole=whole,
            window=window,
            rows=self._times(),
            peak_memory_bytes=_peak_memory(self.device),
            energy_j=energy_j,
            joules_per_token=None if energy_j is None or not energy_tokens else energy_j / energy_tokens,
            convention=told,
            notes=tuple(self._notes(whole, window)),
        )

    def _notes(self, whole: Figures | None, window: Figures | None) -> list[str]:
        notes = list(self._recorder.notes())
        if self._unknown:
            unknown = len(self._unknown)
            those, like = ("1 step is", "it") if unknown == 1 else (f"{unknown} steps are", "them")
            notes.append(f"{those} in no figure: nothing like {like} was counted yet.")
        if whole is None:
            notes.append("no step is timed yet: the first ones, and those that are counted, are in no figure.")
        elif whole.mfu is None:
            notes.append(f"no MFU: {self.peaks.reason}")
        elif self.peaks.measured:
            notes.append("MFU and HFU are of a peak that was measured, not of the vendor's.")
        if whole is not None:
            notes += over_peak(whole, window)
        return notes

    def _times(self) -> dict[str, float]:
        rows = {"steps": 0.0, "left_out": 0.0, "data_wait": 0.0, "evaluation": 0.0}
        for record in self.records:
            rows["left_out" if record.left_out or record.flops is None else "steps"] += record.step_time_s
            rows["data_wait"] += record.data_wait_s
            rows["evaluation"] += record.evaluation_s
            for name, seconds in record.paused_s.items():
                rows[row_of(name)] = rows.get(row_of(name), 0.0) + seconds
        for name, seconds in {**self._rows, "evaluation": self._evaluation_s()}.items():
            rows[row_of(name)] = rows.get(row_of(name), 0.0) + seconds
        return rows

    # --- resuming ----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Plain values that `restore` goes on from."""
        number_of = self._recorder.tracker.tree.numbered()
        return {
            "records": [msgspec.to_builtins(record) for record in self.records],
            "signatures": [number_of(segments) for segments in self._signatures],
            "uncounted": dict(self._uncounted),
            "rows": {**self._rows, "evaluation": self._evaluation_s()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.records = [msgspec.convert(record, StepRecord) for record in state["records"]]
        found = self._recorder.tracker.tree.found
        self._signatures = {found(numbers): i for i, numbers in enumerate(state["signatures"])}
        self._kinds_seen = len(state["signatures"])
        self._unknown.clear()
        self._uncounted = dict(state["uncounted"])
        self._rows = dict(state["rows"])
        self._recorder.between.forget()

    def close(self) -> None:
        """Close the file."""
        self.fill()
        self._evaluated(wait=True)
        if self._writer is not None:
            self._writer.close()


class _Kind(NamedTuple):
    """What the steps of one signature have in common. number: of the signature."""

    number: int
    flops: dict[str, tuple[int, int]] | None = None
    bytes_moved: int = 0
    calls: int = 0
    uncounted: dict[str, int] | None = None


def _told(work: Work) -> tuple[dict[str, tuple[int, int]], int, int, dict[str, int]]:
    """(FLOPs by rate, bytes, calls without a count, those by operator) of a step's work."""
    flops = {rate: (row[0] + row[1], sum(row)) for rate, row in work.flops.items()}
    return flops, work.bytes_moved, sum(work.uncounted.values()), work.uncounted


class _Energy:
    """What the GPU draws from the first step that is in the figures."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._counter: Any = None
        self._from = 0
        self.starts = device.startswith("cuda")

    def start(self) -> None:
        """Begin to count joules."""
        from flopprof.hardware.energy import energy_counter

        self.starts = False
        self._counter = energy_counter([self._device])

    def read(self, records: list[StepRecord]) -> tuple[float | None, int]:
        """(joules, tokens) since then; None where it is not measured."""
        if self._counter is None:
            return None, 0
        first = next((i for i, record in enumerate(records) if not record.left_out), len(records))
        return self._counter.joules(), sum(record.tokens for record in records[first + 1 :])


def _peak_memory(device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))
