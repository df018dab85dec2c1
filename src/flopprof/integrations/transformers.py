"""MFU in the logs of a Hugging Face Trainer: `Trainer(..., callbacks=[FlopprofCallback()])`."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flopprof.integrations.follow import Following, checked
from flopprof.meter import Meter
from flopprof.meter.summary import Summary


class FlopprofCallback(TrainerCallback):
    """Adds MFU, HFU, FLOP/s and throughput to what the Trainer logs, so that every `report_to` gets them.

    A step is the Trainer's own: all micro-batches of one optimizer step, without evaluation, saving and waiting for
    data. options are those of flopprof.Meter but its models: peak=, attention=, records=, skip=, recount_every= ...
    The last log, and what `train()` returns, holds the figures of the whole run; `meter.summary()` says more.
    """

    def __init__(self, *, prefix: str = "flopprof/", **options: Any) -> None:
        self._prefix = prefix
        self._options = checked(options)
        self._run: Following | None = None

    @property
    def meter(self) -> Meter | None:
        """The meter of the run under way, or of the last one."""
        return None if self._run is None else self._run.meter

    def summary(self) -> Summary | None:
        """Of the run so far."""
        return None if self._run is None else self._run.meter.summary()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new run, or one that goes on from a checkpoint's step."""
        # What is logged reaches the reporting callbacks, which come first, only from before them: a callback is not
        # given the list it stands in.
        handler: Any = sys._getframe(1).f_locals.get("self")
        callbacks = getattr(handler, "callbacks", None)
        if isinstance(callbacks, list) and self in callbacks:
            handler.callbacks = [self, *(other for other in callbacks if other is not self)]
        if self._run is not None:
            self._run.close()
        self._run = Following(kwargs["model"], self._options, step=state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first micro-batch is there."""
        if self._run is not None:
            self._run.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        if self._run is not None:
            self._run.end()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation is over."""
        if self._run is not None:
            self._run.passed("evaluation")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is written."""
        if self._run is not None:
            self._run.passed("saving")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The Trainer's logs of training get the rolling figures; its last one those of the run."""
        if self._run is None or logs is None or any(name.startswith(("eval_", "test_")) for name in logs):
            return
        meter = self._run.meter
        found = meter.metrics(self._prefix, steps=len(meter.records) or None if "train_runtime" in logs else None)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training is over."""
        if self._run is not None:
            self._run.end()
            self._run.close()
