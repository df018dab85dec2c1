"""Joules from NVML's counter: differences, several GPUs, counters that wrap or start anew, and all that may lack."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flopprof.hardware.energy import EnergyCounter, energy_counter


class FakeNvml:
    """As much of pynvml as is used: counters in millijoules by GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, **millijoules: int) -> None:
        self.millijoules = {f"GPU-{name}": value for name, value in millijoules.items()}
        self.limit_mw: int | None = 700_000
        self.opened = 0
        self.driver = True

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("driver not loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        if name not in self.millijoules:
            raise self.NVMLError("not found")
        return name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        value = self.millijoules[handle]
        if value < 0:
            raise self.NVMLError("not supported")
        return value

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        if self.limit_mw is None:
            raise self.NVMLError("not supported")
        return self.limit_mw


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(a=5_000_000, b=70_000)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def opened(*names: str, **options: Any) -> EnergyCounter:
    counter = energy_counter([f"GPU-{name}" for name in names], **options)
    assert counter is not None
    return counter


def test_joules_since_it_was_made(nvml: FakeNvml) -> None:
    counter = opened("a")
    assert counter.joules() == 0.0
    nvml.millijoules["GPU-a"] += 1_234
    assert counter.joules() == 1.234
    nvml.millijoules["GPU-a"] += 2_000
    assert counter.joules() == 3.234
    assert counter.restarts == 0


def test_several_gpus(nvml: FakeNvml) -> None:
    counter = opened("a", "b")
    nvml.millijoules["GPU-a"] += 1_000
    nvml.millijoules["GPU-b"] += 500
    assert counter.per_gpu() == (1.0, 0.5)
    assert counter.joules() == 1.5


def test_close_keeps_the_sum_and_lets_nvml_go(nvml: FakeNvml) -> None:
    counter = opened("a")
    assert nvml.opened == 1
    nvml.millijoules["GPU-a"] += 1_000
    assert counter.close() == 1.0
    assert nvml.opened == 0
    nvml.millijoules["GPU-a"] += 1_000
    assert counter.joules() == counter.close() == 1.0
    assert nvml.opened == 0


def test_a_counter_that_starts_anew(nvml: FakeNvml) -> None:
    counter = opened("a", clock=iter(range(100)).__next__)
    nvml.millijoules["GPU-a"] += 1_000
    assert counter.joules() == 1.0
    nvml.millijoules["GPU-a"] = 300  # a driver reload: what it counted since is known, what was before it is not
    assert counter.joules() == 1.3
    nvml.millijoules["GPU-a"] = 500
    assert counter.joules() == 1.5
    assert counter.restarts == 1


def test_a_counter_of_32_bits_that_wraps(nvml: FakeNvml) -> None:
    nvml.millijoules["GPU-a"] = 2**32 - 4_000
    counter = opened("a", clock=iter((0.0, 10.0)).__next__)
    nvml.millijoules["GPU-a"] = 1_000  # 5 J in 10 s: a GPU of 700 W can have drawn that
    assert counter.joules() == 5.0
    assert counter.restarts == 0


def test_a_wrap_that_no_gpu_can_have_drawn_is_a_restart(nvml: FakeNvml) -> None:
    nvml.millijoules["GPU-a"] = 2**31
    counter = opened("a", clock=iter((0.0, 10.0)).__next__)
    nvml.millijoules["GPU-a"] = 1_000  # 2.1 MJ in 10 s
    assert (counter.joules(), counter.restarts) == (1.0, 1)


def test_without_a_power_limit_less_is_a_restart(nvml: FakeNvml) -> None:
    nvml.limit_mw = None
    nvml.millijoules["GPU-a"] = 2**32 - 4_000
    counter = opened("a", clock=iter((0.0, 10.0)).__next__)
    nvml.millijoules["GPU-a"] = 1_000
    assert (counter.joules(), counter.restarts) == (1.0, 1)


def test_a_gpu_that_can_no_longer_be_read_gives_no_figure(nvml: FakeNvml) -> None:
    counter = opened("a", "b")
    nvml.millijoules["GPU-a"] += 1_000
    assert counter.joules() == 1.0
    nvml.millijoules["GPU-b"] = -1
    assert counter.joules() is None
    nvml.millijoules["GPU-b"] = 90_000
    assert counter.joules() is None  # what it drew meanwhile is not known
    assert counter.close() is None
    assert nvml.opened == 0


def test_none_where_energy_cannot_be_measured(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_counter(["GPU-nowhere"]) is None
    nvml.millijoules["GPU-a"] = -1  # older than Volta
    assert energy_counter(["GPU-a"]) is None
    assert energy_counter([]) is None
    assert nvml.opened == 0
    nvml.driver = False
    assert energy_counter(["GPU-b"]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter(["GPU-b"]) is None


def test_torchs_devices_go_by_their_uuid(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {0: SimpleNamespace(name="NVIDIA L4", uuid="b"), 1: SimpleNamespace(name="NVIDIA L4 MIG 1g", uuid="a")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: seen[torch.device("cuda", device).index])
    for devices in (None, [0]):
        counter = energy_counter(devices)
        assert counter is not None
        nvml.millijoules["GPU-b"] += 2_000
        assert counter.joules() == 2.0
    assert energy_counter([1]) is None  # the counter is of the whole GPU


def test_no_cuda_device_no_energy(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy_counter() is None
    assert nvml.opened == 0
