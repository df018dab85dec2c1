"""The peak that each part of a step's work is held against. A rate is a dtype, or `float32:convolution`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flopprof import hardware
from flopprof.errors import FlopprofError, UsageError
from flopprof.hardware import Device, Peak

Given = Peak | int | float | str | Mapping[str, Peak | int | float] | Iterable[Peak] | None


class Peaks:
    """Peaks by rate: those that were given, else those of the table. What is not known has a sentence that says so."""

    def __init__(self, given: Given, device: str) -> None:
        self._given, self._where = given, device
        self._by_dtype: dict[str, Peak] = {}
        self._each: float | None = None
        self._device: Device | None = None
        self.reason = ""  # why a peak is not known
        if isinstance(given, bool) or given == 0:
            raise UsageError(f"peak is a Peak, FLOP/s, a device's name or peaks by dtype, got {given!r}.")
        if isinstance(given, int | float):
            self._each = float(given)
        elif isinstance(given, str):
            self._device = hardware.device(given)
        elif isinstance(given, Peak):
            self._by_dtype[given.dtype] = given
        elif isinstance(given, Mapping):
            for dtype, peak in given.items():
                name = hardware.table.canonical(dtype)
                self._by_dtype[name] = (
                    peak if isinstance(peak, Peak) else Peak(device="given", dtype=name, flops_per_s=round(peak))
                )
        elif given is not None:
            self._given = given = tuple(given)
            self._by_dtype = {peak.dtype: peak for peak in given}
        else:
            try:
                self._device = hardware.device(device)
            except FlopprofError as error:
                self.reason = str(error)

    def on(self, device: str) -> Peaks:
        """The same for another torch device."""
        return Peaks(self._given, device)

    def flops_per_s(self, rate: str) -> float | None:
        """The dense peak of that rate; None where it is not known, and `reason` then says why."""
        if self._each is not None:
            return self._each
        dtype, _, kind = rate.partition(":")
        for name in self._columns(dtype, kind):
            if name in self._by_dtype:
                return self._by_dtype[name].flops_per_s
        if self._device is not None:
            try:
                return self._device.peak(self._columns(dtype, kind)[0]).flops_per_s
            except FlopprofError as error:
                self.reason = str(error)
        elif self._by_dtype:
            known = ", ".join(self._by_dtype)
            self.reason = f"the peak that was given is of {known}, and the loop multiplies {dtype} too: give both."
        return None

    def _columns(self, dtype: str, kind: str) -> tuple[str, ...]:
        name = hardware.table.canonical(dtype)
        if name != "float32" or not self._where.startswith("cuda"):
            return (name,)
        rate = hardware.float32_rate(kind or "matmul")  # type: ignore[arg-type]  # one of its three
        has = self._device is None or rate in self._device.peaks
        return (rate, name) if has else (name,)

    @property
    def bytes_per_s(self) -> float | None:
        """Memory bandwidth; None where it is not known."""
        if self._device is not None:
            return self._device.bytes_per_s
        return next((peak.bytes_per_s for peak in self._by_dtype.values() if peak.bytes_per_s is not None), None)

    @property
    def label(self) -> str:
        """What the peak is of, in a few words."""
        if self._each is not None:
            return "as given"
        if self._device is not None:
            return self._device.name
        names = dict.fromkeys(f"{'measured on ' if p.measured else ''}{p.device}" for p in self._by_dtype.values())
        return ", ".join(names)

    def describe(self, rates: Iterable[str]) -> dict[str, Any]:
        """FLOP/s by rate, of those that are known."""
        return {rate: peak for rate in rates if (peak := self.flops_per_s(rate)) is not None}

    @property
    def measured(self) -> bool:
        """Was it measured, and not looked up?"""
        return any(peak.measured for peak in self._by_dtype.values())
