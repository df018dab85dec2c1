"""MFU of a training loop: counted once per kind of step, timed ever after."""

from flopprof.meter.figures import Figures, Percentiles, StepRecord
from flopprof.meter.meter import Meter
from flopprof.meter.summary import Convention, Summary

__all__ = ["Convention", "Figures", "Meter", "Percentiles", "StepRecord", "Summary"]
