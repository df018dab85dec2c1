"""The peak that matrix products really reach here: a short sweep of shapes. Imports torch."""

from __future__ import annotations

import contextlib
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flopprof.errors import NoPeak, UsageError
from flopprof.hardware.detect import here, name_of
from flopprof.hardware.sweep import Measurement, Shape, Timing
from flopprof.hardware.table import canonical

Clock = Callable[[], float]

REPETITIONS = 20
SECONDS = 1.0
_FEWEST = 3
_WARM_UP = 2
_SEED = 0
# A cache holds the smallest of these, main memory the largest; powers of two fill every tile of every library.
_SQUARES = {"cpu": (256, 512, 1024, 2048, 4096), "mps": (1024, 2048, 4096, 8192)}
_SQUARES_ELSEWHERE = (1024, 2048, 4096, 8192, 16384)
_OBLONG = ((8192, 8192, 2048), (8192, 4096, 16384))  # a thin summed dimension; the up-projection of a decoder
_FLOAT8 = "float8_e4m3fn"


def measure(
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    seconds: float = SECONDS,
    shapes: Sequence[Shape] | None = None,
    clock: Clock | None = None,
    progress: Callable[[Timing], None] | None = None,
) -> Measurement:
    """A sweep of matrix products of random normal numbers, each shape warmed up and repeated; medians.

    device    a torch device; None: the accelerator that is here, else the CPU
    dtype     "float32", "tf32", "bf16", "fp16", "fp8", ...; None: float32 on a CPU, bfloat16 elsewhere
    seconds   per shape: 20 repetitions, or as many as fit, but at least 3. A shape of which one run takes longer
              than this is left out
    shapes    (m, k, n) each; None: squares and, off the CPU, two oblong ones
    clock     seconds since any moment; None: the device's own events on CUDA, else time.perf_counter
    progress  called with each shape when it is done

    Raises NoPeak where the device cannot multiply that dtype. torch's settings and random state stay as they were.
    """
    place = here(device)
    if not seconds > 0:
        raise UsageError(f"seconds per shape must be more than 0, got {seconds:g}.")
    name = canonical(dtype) if dtype is not None else "float32" if place.type == "cpu" else "bfloat16"
    name = _float8(place) if name == "float8" else name
    if shapes is None:
        shapes = [(n, n, n) for n in _SQUARES.get(place.type, _SQUARES_ELSEWHERE)]
        shapes = shapes if place.type == "cpu" else [*shapes, *_OBLONG]
    if not shapes or min(map(min, shapes)) < 1:
        raise UsageError(f"give at least one shape (m, k, n) of positive sizes, got {list(shapes)}.")
    timings: list[Timing] = []
    fastest = 0.0
    with torch.no_grad(), _rate(name):
        for shape in shapes:
            expected = 2 * shape[0] * shape[1] * shape[2] / fastest if timings else 0.0
            if expected > seconds or (timings and not _fits(place, shape, _torch_dtype(name, place).itemsize)):
                continue
            timing = _timed(place, name, shape, seconds, clock)
            timings.append(timing)
            fastest = max(fastest, timing.flops_per_s)
            if progress is not None:
                progress(timing)
    return Measurement(
        device=_device_name(place),
        dtype=name,
        timings=tuple(timings),
        torch_version=torch.__version__,
        threads=torch.get_num_threads() if place.type == "cpu" else None,
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    )


def _float8(place: torch.device) -> str:
    """The float8 that the device multiplies: MI300's units take the format without negative zero."""
    if place.type == "cuda" and "gfx94" in getattr(torch.cuda.get_device_properties(place), "gcnArchName", ""):
        return "float8_e4m3fnuz"
    return _FLOAT8


def _timed(place: torch.device, name: str, shape: Shape, seconds: float, clock: Clock | None) -> Timing:
    multiply = _product(place, name, shape)
    try:
        for _ in range(_WARM_UP):
            multiply()
        _wait(place)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise NoPeak(f"{_device_name(place)} has no memory left for a product of {shape}: free some.") from error
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise NoPeak(f"{_device_name(place)} does not multiply {name} in this torch ({reason}).") from error
    times: list[float] = []
    for taken in _runs(place, multiply, clock):
        times.append(taken)
        if len(times) >= REPETITIONS or (len(times) >= _FEWEST and sum(times) >= seconds):
            break
    if min(times) <= 0:
        raise UsageError(f"the clock did not advance over a product of {shape}: give a finer one.")
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(shape=shape, repetitions=len(times), median_s=median, q1_s=q1, q3_s=q3)


def _runs(place: torch.device, multiply: Callable[[], object], clock: Clock | None) -> Iterator[float]:
    """Seconds of one product after another, without end."""
    if place.type == "cuda" and clock is None:
        while True:
            # on the device's own clock: what it waits for the host is not in it
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(place))
            multiply()
            end.record(torch.cuda.current_stream(place))
            end.synchronize()
            yield start.elapsed_time(end) / 1000
    clock = clock or time.perf_counter
    while True:
        began = clock()
        multiply()
        _wait(place)
        yield clock() - began


def _product(place: torch.device, name: str, shape: Shape) -> Callable[[], object]:
    m, k, n = shape
    dtype = _torch_dtype(name, place)
    random = torch.Generator(place).manual_seed(_SEED)
    try:
        if dtype.itemsize == 1:
            # fp8 products take the right operand by columns, and a scale each
            a = torch.randn(m, k, device=place, generator=random).to(dtype)
            b = torch.randn(n, k, device=place, generator=random).to(dtype).t()
            one = torch.ones((), device=place)
            into = torch.empty(m, n, device=place, dtype=torch.bfloat16)
            return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, out=into)
        left = torch.randn(m, k, device=place, generator=random).to(dtype)
        right = torch.randn(k, n, device=place, generator=random).to(dtype)
        out = torch.empty(m, n, device=place, dtype=dtype)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise NoPeak(f"{_device_name(place)} holds no {name} matrices of {shape} ({reason}).") from error
    return lambda: torch.mm(left, right, out=out)


def _torch_dtype(name: str, place: torch.device) -> torch.dtype:
    if name == "tf32" and place.type != "cuda":
        raise NoPeak(f"tf32 exists on CUDA devices only: measure float32 on {place.type}.")
    dtype = getattr(torch, "float32" if name == "tf32" else name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise NoPeak(f"cannot measure {name!r}: choose fp64, fp32, tf32, bf16, fp16 or fp8.")
    return dtype


@contextlib.contextmanager
def _rate(name: str) -> Iterator[None]:
    """Has torch multiply float32 in tf32 or in float32 as named, whatever it is set to; its settings come back."""
    cuda: Any = torch.backends.cuda.matmul  # both answer any attribute
    cpu: Any = torch.backends.mkldnn
    if not hasattr(cuda, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    places: tuple[Any, ...] = (cuda, cpu.matmul)
    settings = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32" if name == "tf32" and place is cuda else "ieee"
    try:
        yield
    finally:
        for place, setting in zip(places, settings, strict=True):
            place.fp32_precision = setting


def _fits(place: torch.device, shape: Shape, itemsize: int) -> bool:
    if place.type != "cuda":
        return True
    m, k, n = shape
    free, _total = torch.cuda.mem_get_info(place)
    return 2 * (m * k + k * n + m * n) * max(itemsize, 4) < free  # they are drawn in float32


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def _device_name(place: torch.device) -> str:
    return _processor() if place.type == "cpu" else name_of(place)


def _processor() -> str:
    """The processor's name, as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"
