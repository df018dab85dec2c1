"""MFU in the logs of a Lightning Trainer: `Trainer(..., callbacks=[FlopprofCallback()])`."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from flopprof.errors import MissingPackage
from flopprof.integrations.follow import Following, checked
from flopprof.meter import Meter
from flopprof.meter.summary import Summary

if TYPE_CHECKING:
    import lightning.pytorch as pl


def _callback() -> Any:
    """The class of callbacks, of the package that is in use: it goes by two names, which know nothing of each other."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise MissingPackage("the Lightning callback needs Lightning: pip install lightning.")


class FlopprofCallback(_callback()):  # type: ignore[misc]  # known when it runs
    """Logs MFU, HFU, FLOP/s and throughput as often as the Trainer logs, to whatever logger it has.

    A step is one in which an optimizer steps: all batches that are accumulated, and all optimizers of a batch that is
    optimized manually. Validation, saving and waiting for data are no part of it. options are those of flopprof.Meter
    but its models: peak=, attention=, records=, tokens=, samples= (batch -> number) ...
    """

    def __init__(self, *, prefix: str = "flopprof/", **options: Any) -> None:
        self._prefix = prefix
        self._options = checked(options)
        self._run: Following | None = None
        self._at = 0

    @property
    def meter(self) -> Meter | None:
        """The meter of the run under way, or of the last one."""
        return None if self._run is None else self._run.meter

    def summary(self) -> Summary | None:
        """Of the run so far."""
        return None if self._run is None else self._run.meter.summary()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new run, or one that goes on from a checkpoint's step."""
        if self._run is not None:
            self._run.close()
        self._run = Following(pl_module, self._options, step=trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins, or goes on with one more batch."""
        run = self._run
        if run is None:
            return
        run.go_on()
        if not run.open:
            self._at = trainer.global_step
            run.begin(batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is over if an optimizer has stepped; else more batches are accumulated."""
        run = self._run
        if run is None or not run.open:
            return
        if trainer.global_step == self._at:
            run.wait()
            return
        run.end()
        if trainer._logger_connector.should_update_logs:
            found = run.meter.metrics(self._prefix)
            if found:
                pl_module.log_dict(found, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation begins: between two steps, or between batches that are accumulated in one."""
        if self._run is not None:
            self._run.instead("evaluation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is over."""
        if self._run is not None and not trainer.sanity_checking:
            self._run.instead("data_wait")
            self._run.passed("evaluation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training is over."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Training has ended too early."""
        self._close()

    def _close(self) -> None:
        if self._run is not None:
            self._run.close()
