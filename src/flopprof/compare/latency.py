"""How long one forward really takes here: median and 95th percentile over many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flopprof.compare.comparison import Latency
from flopprof.counting.preserve import preserved
from flopprof.errors import UsageError
from flopprof.models import Workload

_WARM_UP, _LEAST, _MOST = 3, 5, 1000


def measure_latency(
    workload: Workload, *, seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter
) -> Latency:
    """Seconds of one forward without gradients, from its call until the device has finished.

    seconds: how long to repeat it, after 3 warm-up runs; at least 5 runs, at most 1000. p95 is the smallest time that
    95% of the runs do not exceed. Raises UsageError on meta, and whatever the model raises.
    """
    kind = workload.device.partition(":")[0]
    if kind == "meta":
        raise UsageError(f"{workload.name} lives on meta, where nothing takes time: move it to the CPU or a GPU.")
    times: list[float] = []
    with preserved([workload.model], (workload.args, workload.kwargs)), torch.inference_mode():
        for _ in range(_WARM_UP):
            workload.model(*workload.args, **workload.kwargs)
        _finish(kind)
        while len(times) < _LEAST or (sum(times) < seconds and len(times) < _MOST):
            start = clock()
            workload.model(*workload.args, **workload.kwargs)
            _finish(kind)
            times.append(clock() - start)
    return summarised(times, device=_device_name(kind), samples=workload.samples)


def summarised(times: list[float], *, device: str, samples: int | None) -> Latency:
    """Median (of an even number the mean of the middle two) and nearest-rank 95th percentile."""
    ranked = sorted(times)
    middle = len(ranked) // 2
    median = ranked[middle] if len(ranked) % 2 else (ranked[middle - 1] + ranked[middle]) / 2
    p95 = ranked[math.ceil(0.95 * len(ranked)) - 1]
    return Latency(median_s=median, p95_s=p95, runs=len(ranked), device=device, samples=samples)


def free_bytes(kind: str) -> int | None:
    """Memory that a new model could take on a device, by what it and the system report; None: it is not known.

    On the CPU half of what is available, because models are built in float32 before they are cast.
    """
    if kind.partition(":")[0] == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(facts["MemAvailable"].split()[0]) * 1024 // 2
    except (OSError, KeyError):  # off Linux
        return None


def _finish(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def _device_name(kind: str) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{kind}, {torch.get_num_threads()} threads"
