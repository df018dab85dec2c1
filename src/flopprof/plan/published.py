"""Published training runs, and the utilisation that their own figures imply."""

from __future__ import annotations

import functools
import importlib.resources
import tomllib

import msgspec

from flopprof.hardware import peak
from flopprof.plan.result import Run

_TERA = 10**12
_HOUR_S = 3600


@functools.cache
def runs() -> tuple[Run, ...]:
    """Every row of data/runs.toml, in the file's order, with what each device reached and its share of the peak."""
    text = importlib.resources.files("flopprof").joinpath("data", "runs.toml").read_text(encoding="utf-8")
    return tuple(_run(row) for row in tomllib.loads(text)["run"])


def _run(row: dict[str, object]) -> Run:
    told = row.pop("tflops_per_device", None)
    run = msgspec.convert({**row, "flops_per_s": 0.0, "utilisation": 0.0}, Run)
    reached = told * _TERA if isinstance(told, float) else run.flops / ((run.device_hours or 0.0) * _HOUR_S)
    share = reached / peak(run.device, run.dtype).flops_per_s
    return msgspec.structs.replace(run, flops_per_s=reached, utilisation=share)
