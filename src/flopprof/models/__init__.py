"""A name -> a workload: the model and example inputs, ready to count."""

from __future__ import annotations

from flopprof.models.targets import load
from flopprof.models.workload import Workload

__all__ = ["Workload", "load"]
