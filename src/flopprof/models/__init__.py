"""A name -> a workload: the model and example inputs, ready to count. Lazily: the catalogue is read without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flopprof.models.targets import load as load
    from flopprof.models.workload import Workload as Workload

_HOME = {"Workload": "flopprof.models.workload", "load": "flopprof.models.targets"}
__all__ = ["Workload", "load"]


def __getattr__(name: str) -> Any:  # the value is whatever the public name is
    if name not in _HOME:
        raise AttributeError(f"module 'flopprof.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
