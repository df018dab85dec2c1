"""Meter: MFU of a training loop, counted once per kind of step and timed ever after."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
import torch

from flopprof.errors import FlopprofError, UsageError
from flopprof.meter.checks import check_function, check_models, check_records, size, whole
from flopprof.meter.figures import Figures, StepRecord
from flopprof.meter.history import History
from flopprof.meter.peaks import Given, Peaks
from flopprof.meter.recorder import Recorder
from flopprof.meter.stepping import Stepping
from flopprof.meter.summary import Summary
from flopprof.meter.timing import device_of, timer_for
from flopprof.profile import Attention

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from flopprof.meter.world import World

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class Meter(Stepping):
    """MFU, HFU and throughput of a training loop, at the cost of a comparison per step.

    model       the module that is trained, or several (GAN, teacher and student): all whose work counts. Tokens and
                samples are those of the first one's inputs
    peak        a flopprof.Peak (or several), FLOP/s, a device's name, or FLOP/s by dtype; None: from the table. A CPU
                has none there: give peak=flopprof.measure_peak()
    attention   `full` counts every query-key pair, `causal` only those that the operator's mask lets through
    convention  `nanogpt`, `palm`, `megatron`, `torchtitan`: what a script that follows it prints, beside ours
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
    >>> with Meter(model, peak=1e12) as meter:
    ...     for batch in meter.track([torch.randn(2, 8)] * 5, progress=False):
    ...         model(batch).sum().backward()
    >>> meter.records[-1].model_flops  # 2 x 2 x 8 x 4 forward, as much for the weight's gradient
    256
    """

    def __init__(
        self,
        model: torch.nn.Module | Iterable[torch.nn.Module] = (),
        *more: torch.nn.Module,
        peak: Given = None,
        attention: Attention = "full",
        convention: str | None = None,
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
        self._options = {
            name: value for name, value in locals().items() if name not in ("self", "model", "more", "__class__")
        }
        first = model if isinstance(model, Iterable) and not isinstance(model, torch.nn.Module) else [model]
        models = [*first, *more]
        check_models(models, attention)
        for name, function in (("log", log), ("clock", clock), ("wall_clock", wall_clock)):
            if function is not None or name == "wall_clock":
                check_function(name, function)
        if records is not None:
            check_records(records)
        sizes = size("tokens", tokens), size("samples", samples)
        self.attention: Attention = attention
        self.device = device_of(models)
        clock = clock or time.perf_counter
        recorder = Recorder(models, attention, timer_for(self.device, clock), clock)
        try:
            history = History(
                recorder,
                Peaks(peak, self.device),
                device=self.device,
                attention=attention,
                convention=convention,
                window=whole("window", window, 1),
                path=records,
                epoch=(wall_clock, clock),
            )
            super().__init__(
                recorder,
                history,
                sizes=sizes,
                skip=whole("skip", skip, 0),
                recount_every=None if recount_every is None else whole("recount_every", recount_every, 1),
                log=log,
                log_every=whole("log_every", log_every, 1),
            )
        except BaseException:
            recorder.remove()
            raise

    # --- the loop ----------------------------------------------------------------------------------------------------
    def track(self, loader: Iterable[T], *, progress: bool = True) -> Iterator[T]:
        """The loader's batches; what the loop does with each is one step, waiting for it is data_wait_s.

        progress  a line on standard error: step, MFU, HFU, FLOP/s, tokens/s, time per step. On a terminal it is
                  rewritten in place, elsewhere printed every 100 steps
        """
        from flopprof.meter.progress import Progress

        line = Progress(self.figures, loader) if progress else None
        clock, batches = self._clock, None
        try:
            while True:
                self._evaluated()
                asked = clock()
                if batches is None:
                    batches = iter(loader)  # which may start workers
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                self.start_step(batch, data_wait_s=clock() - asked)
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

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, each call of which is one step."""

        def stepped(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.step((args, kwargs) if kwargs else args):
                return function(*args, **kwargs)

        stepped.__name__ = getattr(function, "__name__", "stepped")
        stepped.__doc__ = function.__doc__
        stepped.__wrapped__ = function  # type: ignore[attr-defined]  # as functools.wraps does
        return stepped

    def watch(self, model: torch.nn.Module) -> None:
        """One more model whose calls tell steps apart."""
        check_models([model], self.attention)
        if not self._recorder.models and not self._begun:
            self.device = device_of([model])
            self._history.move(self.device)
            self._recorder.timer = timer_for(self.device, self._clock)
        self._recorder.add(model)

    # --- results -----------------------------------------------------------------------------------------------------
    @property
    def records(self) -> list[StepRecord]:
        """One record per step that the device is past."""
        self._settle()
        self._history.fill()
        return self._history.records

    @property
    def peaks(self) -> Peaks:
        """What the figures are held against."""
        return self._history.peaks

    @property
    def models(self) -> list[torch.nn.Module]:
        """The models whose calls are seen."""
        return self._recorder.models

    def summary(self) -> Summary:
        """Everything so far; `print` shows it. Waits for the device once."""
        self._settle(wait=True)
        return self._history.summary()

    def figures(self, steps: int | None = None) -> Figures | None:
        """Figures of the latest timed steps (None: of the rolling window), of what is known without waiting."""
        self._settle()
        return self._history.latest(steps)

    def metrics(self, prefix: str = "flopprof/", *, steps: int | None = None) -> dict[str, float]:
        """Figures of so many steps (None: the rolling ones) as a flat dict for a logger, without what is unknown."""
        current = self.figures(steps)
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

    def world(self, *, group: ProcessGroup | None = None, data_parallel: int | None = None) -> World:
        """Every rank's figures, and those of all devices together: one collective of `group`, which all must join.

        data_parallel  how many ranks read data of their own; None: all, unless tensors or a pipeline are parallel

        Raises FlopprofError where a rank does not answer.
        """
        from flopprof.meter import ranks, world

        rank, _size = ranks.place_of_process()
        report = world.rank_report(
            self.summary(), rank=rank, host=ranks.host(), shared_data=ranks.shares_data(self.models)
        )
        return ranks.gather(report, group=group, data_parallel=data_parallel)

    # --- the end -----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Takes the hooks off the models, and closes the file of records. What was found stays."""
        if self._open is not None:
            self.end_step(failed=True)
        self._evaluated()
        self._settle(wait=True)
        self._closed = True
        self._recorder.remove()
        self._history.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- resuming ----------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Records, and everything counted: plain values for a checkpoint, to go on from in another process."""
        self._settle(wait=True)
        return {
            "version": 1,
            "attention": self.attention,
            "begun": self._begun + (self._open is not None),
            "trained": self._recorder.trained,
            "history": self._history.state(),
            "counted": self._recorder.tracker.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave: nothing that was counted then is counted again."""
        if not isinstance(state, Mapping):
            raise UsageError(f"this is no state of a Meter: it is of type {type(state).__name__}.")
        if state.get("version") != 1:
            raise UsageError(f"this is no state of a Meter, or of a newer one: version {state.get('version')!r}.")
        lacking = [name for name in ("attention", "begun", "trained", "history", "counted") if name not in state]
        if lacking:
            raise UsageError(f"this is no state of a Meter: it lacks {', '.join(lacking)}.")
        if state["attention"] != self.attention:
            raise UsageError(
                f"the state counts attention={state['attention']!r}, this meter {self.attention!r}: make it alike."
            )
        if self._open is not None:
            raise UsageError("a step of this meter is open: load its state between steps.")
        before = self.state_dict()
        self._late.clear()
        self._recorder.forget()
        try:
            self._restore(state)
        except (LookupError, TypeError, ValueError, AttributeError, FlopprofError, msgspec.MsgspecError) as error:
            self._restore(before)
            what = f"{type(error).__name__}, {error}"
            raise UsageError(f"this is no state of a Meter, or it is spoilt: {what}.") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._begun = self._first = whole("begun", state["begun"], 0)
        self._recorder.trained = state["trained"]
        self._recorder.tracker.restore(state["counted"])
        self._history.restore(state["history"])

    def __getstate__(self) -> dict[str, Any]:
        return {"models": self.models, "options": self._options, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["models"], **state["options"])  # type: ignore[misc]  # hooks and clocks are made anew
        self.load_state_dict(state["state"])
