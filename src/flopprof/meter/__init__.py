"""MFU of a training loop: counted once per kind of step, timed ever after. What reads records imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flopprof.meter.figures import Figures, Percentiles, StepRecord
    from flopprof.meter.meter import Meter
    from flopprof.meter.summary import Convention, Summary

_HOME = {
    "Convention": "summary",
    "Figures": "figures",
    "Meter": "meter",
    "Percentiles": "figures",
    "StepRecord": "figures",
    "Summary": "summary",
}
__all__ = ["Convention", "Figures", "Meter", "Percentiles", "StepRecord", "Summary"]


def __getattr__(name: str) -> Any:  # the value is whatever the public name is
    if name not in _HOME:
        raise AttributeError(f"module 'flopprof.meter' has no attribute {name!r}")
    return getattr(importlib.import_module(f"flopprof.meter.{_HOME[name]}"), name)
