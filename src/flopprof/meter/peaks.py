"""The peak that each part of a step's work is held against. A rate is a dtype, or `float32:convolution`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

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
        if isinstance(given, str):
            self._device = hardware.device(given)
        elif isinstance(given, Real) and not isinstance(given, bool):
            self._each = _positive("peak", given)
        elif isinstance(given, Mapping) and given:
            for dtype, peak in given.items():
                for name in _dtypes(dtype):
                    self._by_dtype[name] = (
                        _checked(peak) if isinstance(peak, Peak) else _peak_of(name, f"peak of {str(dtype)!r}", peak)
                    )
        elif given is not None:
            peaks = (given,) if isinstance(given, Peak) else _several(given)
            self._given = peaks
            self._by_dtype = {name: _checked(peak) for peak in peaks for name in _dtypes(peak.dtype)}
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


def _several(given: Any) -> tuple[Peak, ...]:
    try:
        peaks = tuple(given)
    except TypeError:
        peaks = ()
    if not peaks or not all(isinstance(peak, Peak) for peak in peaks):
        shown = list(peaks) if peaks else given
        raise UsageError(f"peak is a Peak, FLOP/s, a device's name or peaks by dtype, got {shown!r}.")
    return peaks


def _dtypes(dtype: Any) -> tuple[str, ...]:
    """The names under which a dtype's rate is asked for."""
    name = hardware.table.canonical(dtype)
    if name == "float8":
        return hardware.table.FLOAT8
    found = getattr(torch, name, None)
    if name != "tf32" and not isinstance(found, torch.dtype):
        raise UsageError(f"peak is by dtype (float32, tf32, bf16 ...), got {dtype!r}.")
    return (name if found is None else hardware.table.canonical(found),)


def _positive(what: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise UsageError(f"{what} is FLOP/s above 0, got {value!r}.")
    return number


def _peak_of(dtype: str, what: str, value: Any) -> Peak:
    number = round(_positive(what, value))
    if number == 0:
        raise UsageError(f"{what} is FLOP/s above 0, got {value!r}.")
    return Peak(device="given", dtype=dtype, flops_per_s=number)


def _checked(peak: Peak) -> Peak:
    _positive(f"peak of {peak.dtype!r}", peak.flops_per_s)
    return peak
