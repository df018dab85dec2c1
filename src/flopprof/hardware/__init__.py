"""What the hardware can do at most: dense peaks from a table with sources, or measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from flopprof.hardware.names import typed
from flopprof.hardware.table import Device, Peak, devices

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "Peak", "device", "devices", "float32_rate", "measure_peak", "peak"]

_DETECTED = ("cpu", "cuda", "mps", "xpu")


def peak(name: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Peak:
    """The dense peak of a device in one dtype, from the table.

    name   what people type ("H100", "RTX 4090"); None or a torch device ("cuda:0"): the one that is here, by the exact
           name that its driver reports
    dtype  "bfloat16", "bf16", torch.bfloat16, "tf32"; None: bfloat16, else float16, else the fastest float there is.
           float32 of a CUDA device that is here is tf32 where torch is set to it; of a typed name it never is

    Raises UnknownDevice, which says how to give a peak, and NoPeak for a dtype that the device lacks.

    >>> peak("H100", "bf16").flops_per_s
    989400000000000
    """
    found = device(name)
    if dtype is not None and _is_here(name):
        from flopprof.hardware.detect import rate_of

        return found.peak(rate_of(found, dtype, name))
    return found.peak(dtype)


def device(name: str | torch.device | None = None) -> Device:
    """The table's row of a typed name, or of the device that is here (None, a torch device). Raises UnknownDevice."""
    if _is_here(name):
        from flopprof.hardware.detect import detected

        return detected(name)
    return typed(str(name))


def _is_here(name: str | torch.device | None) -> bool:
    return not isinstance(name, str) or name.partition(":")[0] in _DETECTED


def measure_peak(
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    seconds: float = 1.0,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    clock: Callable[[], float] | None = None,
) -> Peak:
    """The FLOP/s that matrix products reach on this machine: the best shape of a short sweep, labelled as measured.

    device   a torch device; None: the accelerator that is here, else the CPU
    dtype    "float32", "tf32", "bf16", "fp16", "fp8", ...; None: float32 on a CPU, bfloat16 elsewhere
    seconds  per shape: 20 repetitions, or as many as fit, but at least 3
    shapes   of the products, (m, k, n) each. clock: seconds since any moment, instead of the device's own

    Random normal numbers, warmed up, median per shape. Raises NoPeak where the device does not multiply that dtype.
    `flopprof.hardware.measure.measure` gives every shape with its spread.
    """
    from flopprof.hardware.measure import measure

    return measure(device, dtype, seconds=seconds, shapes=shapes, clock=clock).peak


def float32_rate(of: Literal["matmul", "convolution", "recurrent"] = "matmul") -> Literal["float32", "tf32"]:
    """Which row the float32 operands of matrix products, convolutions or LSTMs on a CUDA device use: torch's settings.

    torch runs cuDNN's convolutions and recurrences in tf32 unless told not to, matrix products only when told to.
    """
    from flopprof.hardware.detect import float32_rate

    return float32_rate(of)
