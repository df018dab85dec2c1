"""Which device is here, and at which rate torch is set to run float32. Imports torch."""

from __future__ import annotations

import os
from typing import Literal

import torch

from flopprof.errors import UnknownDevice
from flopprof.hardware.names import reported
from flopprof.hardware.table import Device, canonical

_NO_CPU = (
    "a CPU has no peak in the table: measure it once, `peak=flopprof.measure_peak()` or `flopprof peaks --measure`, "
    "or pass peak=... in FLOP/s."
)


def detected(where: str | torch.device | None) -> Device:
    """The row of a torch device (None: the accelerator that is here, else the CPU). Raises UnknownDevice."""
    device = here(where)
    if device.type == "cpu":
        raise UnknownDevice(_NO_CPU)
    return reported(name_of(device), **_seen(device))


def name_of(device: torch.device) -> str:
    """The name that the driver of an accelerator reports. Raises UnknownDevice where torch has no way to ask."""
    if device.type == "mps":
        return str(torch.backends.mps.get_name())
    ask = getattr(getattr(torch, device.type, None), "get_device_name", None)
    if ask is None:
        raise UnknownDevice(f"torch cannot name its device {device.type!r}: pass peak=... in FLOP/s.")
    return str(ask(device))


def _seen(device: torch.device) -> dict[str, int]:
    """What tells a device from its parts and sisters: compute units and memory, where torch knows them."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"units": properties.multi_processor_count, "memory_bytes": properties.total_memory}
    if device.type == "mps":
        return {"units": torch.backends.mps.get_core_count()}
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return {"units": xpu.max_compute_units, "memory_bytes": xpu.total_memory}
    return {}


def here(where: str | torch.device | None) -> torch.device:
    """The torch device meant: the current accelerator, or the CPU where there is none. Raises UnknownDevice."""
    if where is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(where)
    except RuntimeError as error:
        raise UnknownDevice(f"{where!r} is no torch device: write cpu, cuda, cuda:1, mps or xpu.") from error
    if device.type in ("cuda", "mps", "xpu"):
        backend = getattr(torch, device.type)
        if not backend.is_available():
            raise UnknownDevice(f"torch sees no {device.type} device here: name one, as flopprof.peak('H100').")
        if (device.index or 0) >= (count := backend.device_count()):
            raise UnknownDevice(f"torch sees {count} {device.type} devices here, numbered from 0; got {device}.")
    return device


def rate_of(device: Device, dtype: str | torch.dtype, where: str | torch.device | None) -> str:
    """The column of `device` that `dtype` uses here: tf32 for float32 where torch is set to it."""
    name = canonical(dtype)
    if name == "float32" and here(where).type == "cuda" and "tf32" in device.peaks:
        return float32_rate()
    return name


def float32_rate(of: Literal["matmul", "convolution", "recurrent"] = "matmul") -> Literal["float32", "tf32"]:
    """What flopprof.hardware.float32_rate says."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":  # read by NVIDIA's libraries themselves
        return "float32"
    module = {
        "matmul": torch.backends.cuda.matmul,
        "convolution": getattr(torch.backends.cudnn, "conv", torch.backends.cudnn),
        "recurrent": getattr(torch.backends.cudnn, "rnn", torch.backends.cudnn),
    }[of]
    precision = getattr(module, "fp32_precision", None)
    allowed = module.allow_tf32 if precision is None else precision == "tf32"  # before torch 2.9 only the former
    return "tf32" if allowed else "float32"
