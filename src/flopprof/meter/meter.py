"""Meter: MFU of a training loop, counted once per kind of step and timed ever after."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
import torch

from flopprof.errors import UsageError
from flopprof.meter.figures import Figures, StepRecord, figures, flops_by_rate, timed
from flopprof.meter.peaks import Given, Peaks
from flopprof.meter.recorder import OpenStep, Recorder
from flopprof.meter.records import SCHEMA, RecordWriter, RunPeaks, RunStart
from flopprof.meter.summary import Summary, over_peak
from flopprof.meter.timing import CudaTimer, HostTimer, Timer
from flopprof.meter.world import World, gather, host, path_of_rank, place_of_process, rank_report, shares_data
from flopprof.profile import Attention

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class Meter:
    """MFU, HFU and throughput of a training loop, at the cost of a dictionary look-up per step.

    model       the module that is trained, or several (GAN, teacher and student): all whose work counts. Tokens and
                samples are those of the first one's inputs
    peak        a flopprof.Peak (or several), FLOP/s, a device's name, or FLOP/s by dtype; None: from the table. A CPU
                has none there: give peak=flopprof.measure_peak()
    attention   `full` counts every query-key pair, `causal` only those that the operator's mask lets through
    skip        so many first steps are in no figure (the very first one is slow: it is counted as it runs)
    window      how many of the latest steps make up the rolling figures
    recount_every   count every so many-th step again, to see that its signature tells all
    tokens, samples  of a step: a number, or batch -> number; None: read off the first model's inputs
    records     a file that every finished step is appended to, as a JSON line: `flopprof report` sums it up; of
                several processes each has its own, `run.rank3.jsonl`
    log, log_every  a function that is given `metrics()` every so many steps: wandb.log, mlflow.log_metrics
    clock       seconds, read at the ends of a step; None: CUDA events where the model is on a GPU, else perf_counter

    What is multiplied is counted once per distinct step: shapes and dtypes of the models' inputs, training and grad
    mode, which parameters want a gradient, lengths in packed batches, calls, backward passes, optimizer steps. That
    step runs under a counter (eagerly where compiled) and is left out of the figures; the ones like it only pass
    hooks. Lengths that vary are evaluated from a form, once counts have proved one.

    >>> import torch
    >>> model = torch.nn.Linear(8, 4)
    >>> meter = Meter(model, peak=1e12)
    >>> for batch in meter.track([torch.randn(2, 8)] * 5, progress=False):
    ...     model(batch).sum().backward()
    >>> meter.records[-1].model_flops  # 2 x 2 x 8 x 4 forward, as much for the weight's gradient
    256
    """

    def __init__(
        self,
        model: torch.nn.Module | Iterable[torch.nn.Module] = (),
        *more: torch.nn.Module,
        peak: Given = None,
        attention: Attention = "full",
        skip: int = 2,
        window: int = 100,
        recount_every: int | None = None,
        tokens: int | Callable[[Any], int] | None = None,
        samples: int | Callable[[Any], int] | None = None,
        records: str | os.PathLike[str] | None = None,
        log: Callable[[dict[str, float]], object] | None = None,
        log_every: int = 10,
        clock: Callable[[], float] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        models = [model] if isinstance(model, torch.nn.Module) else list(model)
        models += more
        for item in models:
            if not isinstance(item, torch.nn.Module):
                raise UsageError(f"Meter takes modules, got {type(item).__name__}.")
        if attention not in ("full", "causal"):
            raise UsageError(f"attention {attention!r} is neither 'full' nor 'causal'.")
        for name, value, least in (
            ("skip", skip, 0),
            ("window", window, 1),
            ("log_every", log_every, 1),
            ("recount_every", recount_every, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UsageError(f"{name} is a whole number of at least {least}, got {value!r}.")
        self.attention: Attention = attention
        self.skip, self.window, self.recount_every = skip, window, recount_every
        self.log, self.log_every = log, log_every
        self.records: list[StepRecord] = []
        self.device = _device_of(models)
        self.peaks = Peaks(peak, self.device)
        self._given = {"tokens": tokens, "samples": samples}
        self._clock = clock
        self._host = HostTimer(clock or time.perf_counter)
        self._timer: Timer = CudaTimer() if clock is None and self.device.startswith("cuda") else self._host
        self._wall_clock = wall_clock
        self._recorder = Recorder(models, attention, self._timer)
        self._open: OpenStep | None = None
        self._late: deque[OpenStep] = deque()
        self._done = 0  # steps begun, restarts included
        self._first = 0  # of this process
        self._signatures: dict[Any, int] = {}
        self._path = records
        self._writer: RecordWriter | None = None
        self._written_peaks: set[str] = set()
        self._loose_pauses: dict[str, float] = {}

    # --- the loop ----------------------------------------------------------------------------------------------------
    def track(self, loader: Iterable[T], *, progress: bool | None = None) -> Iterator[T]:
        """The loader's batches; what the loop does with each is one step, waiting for it is data_wait_s.

        progress  a line on standard error: step, MFU, HFU, FLOP/s, tokens/s, time per step. None: yes; rewritten in
                  place on a terminal, else printed once in a while
        """
        from flopprof.meter.progress import Progress

        line = Progress(self, _length(loader)) if progress is not False else None
        batches = iter(loader)
        try:
            while True:
                start = self._host.mark()
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                waited = self._host.mark() - start
                self.start_step(batch, data_wait_s=waited)
                finished = False
                try:
                    yield batch
                    finished = True
                finally:
                    self.end_step(left_early=not finished)
                if line is not None:
                    line.update()
        finally:
            if line is not None:
                line.close()

    @contextmanager
    def step(self, batch: Any = None) -> Iterator[None]:
        """One step; an exception leaves it out of every figure. batch: what tokens= and samples= are read off."""
        self.start_step(batch)
        try:
            yield
        except BaseException:
            self.end_step(failed=True)
            raise
        self.end_step()

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, each call of which is one step."""

        def stepped(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.step((args, kwargs) if kwargs else args):
                return function(*args, **kwargs)

        stepped.__name__ = getattr(function, "__name__", "stepped")
        stepped.__doc__ = function.__doc__
        stepped.__wrapped__ = function  # type: ignore[attr-defined]  # as functools.wraps does
        return stepped

    def start_step(self, batch: Any = None, *, data_wait_s: float = 0.0) -> None:
        """Begin a step, for loops that call back: `end_step` ends it."""
        if self._open is not None:
            raise UsageError("a step of this meter is open: steps do not nest. End it, or use two meters.")
        recount = bool(self.recount_every) and self._done > self._first and self._done % (self.recount_every or 1) == 0
        step = OpenStep(self._done, batch, data_wait_s)
        self._done += 1
        self._open = step
        self._recorder.open(step, recount=recount)

    def end_step(self, *, failed: bool = False, left_early: bool = False) -> None:
        """End the step: failed ones are in no figure; one that a loop left early is, if it did what steps do."""
        step, self._open = self._open, None
        if step is None:
            raise UsageError("no step of this meter is open: start_step() begins one.")
        self._recorder.close(step, failed=failed)
        step.ended_at = self._wall_clock()
        step.memory = None
        if failed:
            step.left_out.append("failed")
        elif left_early and not step.segments[1:]:
            self._done -= 1  # the loop was left before the step did anything
            return
        elif left_early and not step.optimizer_steps and step.segments not in self._signatures:
            step.left_out.append("interrupted")
        if step.number - self._first < self.skip:
            step.left_out.append("first")
        self._late.append(step)
        self._settle()
        if self.log is not None and self._done % self.log_every == 0:
            self.log(self.metrics())

    @contextmanager
    def pause(self, name: str = "pause") -> Iterator[None]:
        """Time that is no part of the step (saving a checkpoint, evaluating, generating): a row of its own."""
        step = self._open
        if step is None:
            start = self._host.mark()
            try:
                yield
            finally:
                passed = self._host.mark() - start
                self._loose_pauses[name] = self._loose_pauses.get(name, 0.0) + passed
            return
        self._recorder.pause(step, name)
        try:
            yield
        finally:
            self._recorder.resume(step)

    def watch(self, model: torch.nn.Module) -> None:
        """One more model whose calls tell steps apart."""
        self._recorder.add(model)
        if self.device == "cpu" and not self.records:
            self.device = _device_of([model])

    # --- results -----------------------------------------------------------------------------------------------------
    def summary(self) -> Summary:
        """Everything so far; `print` shows it. Waits for the device once."""
        self._settle(wait=True)
        records = self.records
        usable = timed(records)
        peak = self.peaks.flops_per_s
        whole = figures(usable, peak, self.peaks.bytes_per_s)
        window = figures(usable[-self.window :], peak, self.peaks.bytes_per_s)
        left_out: dict[str, int] = {}
        for record in records:
            for reason in record.left_out[:1]:
                left_out[reason] = left_out.get(reason, 0) + 1
        flops = flops_by_rate(records)
        peaks = self.peaks.describe(flops)
        notes = list(self._recorder.notes())
        if whole is None:
            notes.append("no step is timed yet: the first ones, and those that are counted, are in no figure.")
        elif whole.mfu is None:
            notes.append(f"no MFU: {self.peaks.reason}")
        else:
            notes += over_peak(whole)
        return Summary(
            device=self.device,
            peak=self.peaks.label,
            peaks=peaks,
            peak_measured=self.peaks.measured,
            attention=self.attention,
            steps=len(records),
            counted_steps=sum("counted" in record.left_out for record in records),
            signatures=len(self._signatures),
            left_out=left_out,
            flops=flops,
            uncounted=self._recorder.uncounted(),
            tokens=sum(record.tokens for record in records),
            samples=sum(record.samples for record in records),
            optimizer_steps=sum(record.optimizer_steps for record in records),
            whole=whole,
            window=window,
            rows=self._rows(records),
            notes=tuple(notes),
        )

    def world(self, *, group: ProcessGroup | None = None, data_parallel: int | None = None) -> World:
        """Every rank's figures, and those of all devices together: one collective of `group`, which all must join.

        data_parallel  how many ranks read data of their own; None: all, unless the model is tensor-parallel

        Raises FlopprofError where a rank does not answer.
        """
        self._settle(wait=True)
        report = rank_report(
            self.records,
            self.peaks.flops_per_s,
            rank=place_of_process()[0],
            host=host(),
            device=self.device,
            peak=self.peaks.label,
            shared_data=shares_data(self._recorder.models),
        )
        report = msgspec.structs.replace(report, reason=self.peaks.reason)
        return gather(report, group=group, data_parallel=data_parallel)

    def figures(self, steps: int | None = None) -> Figures | None:
        """Figures of the latest timed steps (None: of the rolling window), of what is known without waiting."""
        usable: list[StepRecord] = []
        wanted = steps or self.window
        for record in reversed(self.records):
            if record.flops is not None and not record.left_out:
                usable.append(record)
                if len(usable) == wanted:
                    break
        return figures(usable, self.peaks.flops_per_s, self.peaks.bytes_per_s)

    def metrics(self, prefix: str = "flopprof/") -> dict[str, float]:
        """The rolling figures as a flat dict for a logger: what is not known is left out."""
        current = self.figures()
        if current is None:
            return {}
        found = {
            "mfu": current.mfu,
            "hfu": current.hfu,
            "mbu": current.mbu,
            "model_flops_per_s": current.model_flops_per_s,
            "hardware_flops_per_s": current.hardware_flops_per_s,
            "tokens_per_s": current.tokens_per_s,
            "effective_tokens_per_s": current.effective_tokens_per_s,
            "samples_per_s": current.samples_per_s,
            "step_time_s": current.step_time_s.median,
        }
        return {f"{prefix}{name}": value for name, value in found.items() if value is not None}

    def _rows(self, records: Sequence[StepRecord]) -> dict[str, float]:
        rows = {"steps": 0.0, "left_out": 0.0, "data_wait": 0.0, "evaluation": 0.0, **self._loose_pauses}
        for record in records:
            rows["left_out" if record.left_out or record.flops is None else "steps"] += record.step_time_s
            rows["data_wait"] += record.data_wait_s
            rows["evaluation"] += record.evaluation_s
            for name, seconds in record.paused_s.items():
                rows[name] = rows.get(name, 0.0) + seconds
        return rows

    # --- the end -----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Takes the hooks off the models, and closes the file of records."""
        self._settle(wait=True)
        self._recorder.remove()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle(self, *, wait: bool = False) -> None:
        """Make records of the steps that are past on the device, in order."""
        while self._late:
            made = self._record(self._late[0], wait=wait)
            if made is None:
                return
            self._late.popleft()
            self.records.append(made)
            if self._path is not None:
                self._write(made)

    def _record(self, step: OpenStep, *, wait: bool) -> StepRecord | None:
        times = self._recorder.times(step, wait=wait)
        if times is None:
            return None
        total, evaluation, paused = times
        number = self._signatures.setdefault(step.segments, len(self._signatures))
        work = self._recorder.work(step)
        return StepRecord(
            step=step.number,
            ended_at=step.ended_at,
            step_time_s=max(total - evaluation - sum(paused.values()), 0.0),
            signature=number,
            flops=None if work is None else {rate: (row[0] + row[1], sum(row)) for rate, row in work.flops.items()},
            bytes_moved=0 if work is None else work.bytes_moved,
            uncounted=0 if work is None else sum(work.uncounted.values()),
            tokens=self._size("tokens", step, step.tokens),
            effective_tokens=self._recorder.effective(step),
            samples=self._size("samples", step, step.samples),
            calls=step.calls,
            optimizer_steps=step.optimizer_steps,
            data_wait_s=step.data_wait_s,
            evaluation_s=evaluation,
            paused_s=paused,
            left_out=tuple(dict.fromkeys(step.left_out)),
        )

    def _size(self, name: str, step: OpenStep, seen: int) -> int:
        given = self._given[name]
        return seen if given is None else given if isinstance(given, int) else int(given(step.batch))

    def _write(self, record: StepRecord) -> None:
        assert self._path is not None
        if self._writer is None:
            rank, size = place_of_process()
            start = RunStart(
                started_at=record.ended_at - record.step_time_s - record.data_wait_s,
                schema=SCHEMA,
                rank=rank,
                world_size=size,
                attention=self.attention,
                device=self.device,
                peak=self.peaks.label,
                peak_measured=self.peaks.measured,
                bytes_per_s=self.peaks.bytes_per_s,
                reason=self.peaks.reason,
            )
            self._writer = RecordWriter(path_of_rank(self._path, rank, size), start)
        new = {rate for rate in record.flops or {} if rate not in self._written_peaks}
        if new:
            self._written_peaks |= new
            self._writer.write(RunPeaks(peaks=self.peaks.describe(new), reason=self.peaks.reason))
        self._writer.write(record)

    # --- resuming ----------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Steps, records and everything counted: for a checkpoint, to go on from."""
        self._settle(wait=True)
        return {"version": 1, "done": self._done, "records": list(self.records)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        self._done = self._first = state["done"]
        self.records = list(state["records"])


def _device_of(models: Sequence[torch.nn.Module]) -> str:
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            return str(tensor.device)
    return "cpu"


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
