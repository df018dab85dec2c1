"""What the GPUs have drawn, in joules: NVML's total energy counter, where nvidia-ml-py and the GPU have one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MILLI = 1000
_NARROW = 2**32  # some drivers hand out a counter of 32 bits: 4.3 MJ, two hours of a large GPU
_OVER_LIMIT = 2.0  # short peaks pass the enforced power limit


def energy_counter(
    devices: Sequence[torch.device | str | int] | None = None, *, clock: Callable[[], float] = time.monotonic
) -> EnergyCounter | None:
    """A counter of the joules that CUDA devices draw from now on; None where that cannot be measured.

    devices  torch devices, or NVML's own names of GPUs (`GPU-...`); None: torch's current CUDA device

    None without nvidia-ml-py or NVIDIA's driver, without a CUDA device, and for a GPU without the counter (older than
    Volta), or a MIG slice of one. The counter is of the whole GPU: what other processes run there is in it.
    """
    try:
        import pynvml
    except ImportError:
        return None
    nvml: Any = pynvml  # untyped
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        gpus = [_Gpu.open(nvml, name, clock) for name in _names(devices)]
    except nvml.NVMLError:
        gpus = []
    if not gpus:
        nvml.nvmlShutdown()
        return None
    return EnergyCounter(nvml, gpus)


class EnergyCounter:
    """Joules since it was made, over all its GPUs. Read it now and then: a counter that starts anew is noticed then."""

    def __init__(self, nvml: Any, gpus: Sequence[_Gpu]) -> None:  # nvml: pynvml, untyped
        self._nvml = nvml
        self._gpus = gpus
        self._open = True
        self._lost = False

    @property
    def restarts(self) -> int:
        """How often a GPU's counter began at zero again (driver reload, reset): what it drew just before is lost."""
        return sum(gpu.restarts for gpu in self._gpus)

    def per_gpu(self) -> tuple[float, ...] | None:
        """Joules of each GPU so far; None once a GPU can no longer be read."""
        if self._open and not self._lost:
            try:
                for gpu in self._gpus:
                    gpu.read()
            except self._nvml.NVMLError:
                self._lost = True
        if self._lost:
            return None
        return tuple(gpu.drawn_mj / _MILLI for gpu in self._gpus)

    def joules(self) -> float | None:
        """Joules of all GPUs so far; None once a GPU can no longer be read."""
        each = self.per_gpu()
        return None if each is None else sum(each)

    def close(self) -> float | None:
        """The joules at this moment, which stay; NVML is let go."""
        joules = self.joules()
        if self._open:
            self._open = False
            self._nvml.nvmlShutdown()
        return joules


@dataclass
class _Gpu:
    nvml: Any
    handle: Any
    clock: Callable[[], float]
    limit_mw: int | None
    last_mj: int
    last_s: float
    drawn_mj: int = 0
    restarts: int = 0

    @classmethod
    def open(cls, nvml: Any, name: str, clock: Callable[[], float]) -> _Gpu:
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
        try:
            limit = nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        except nvml.NVMLError:
            limit = None
        return cls(nvml, handle, clock, limit, nvml.nvmlDeviceGetTotalEnergyConsumption(handle), clock())

    def read(self) -> None:
        now_mj, now_s = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle), self.clock()
        drawn = now_mj - self.last_mj
        if drawn < 0:
            drawn = self._after_zero(now_mj, now_s - self.last_s)
        self.drawn_mj += drawn
        self.last_mj, self.last_s = now_mj, now_s

    def _after_zero(self, now_mj: int, passed_s: float) -> int:
        """What was drawn when the counter stands lower than before: it wrapped, if that much can have been drawn."""
        wrapped = now_mj + _NARROW - self.last_mj
        if self.limit_mw is not None and 0 <= wrapped <= _OVER_LIMIT * self.limit_mw * passed_s:
            return wrapped
        self.restarts += 1
        return now_mj


def _names(devices: Sequence[torch.device | str | int] | None) -> list[str]:
    """NVML's name of each GPU: torch's numbers follow CUDA_VISIBLE_DEVICES, NVML's do not."""
    if devices is not None and all(isinstance(name, str) and name.startswith("GPU-") for name in devices):
        return [str(name) for name in devices]
    import torch

    if not torch.cuda.is_available():
        return []
    wanted = [torch.cuda.current_device()] if devices is None else devices
    names = []
    for name in wanted:
        properties = torch.cuda.get_device_properties(name)
        if "MIG" in properties.name.split():
            return []
        names.append(f"GPU-{properties.uuid}")
    return names
