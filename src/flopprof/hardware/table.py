"""The table of dense peaks, read from data/peaks.toml. No torch."""

from __future__ import annotations

import functools
import importlib.resources
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flopprof.errors import NoPeak

_GIGA, _TERA = 10**9, 10**12
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_PREFERRED = ("bfloat16", "float16", "tf32", "float32")
_SHORT = {
    "fp64": "float64",
    "double": "float64",
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp4": "float4_e2m1fn_x2",
    "float4": "float4_e2m1fn_x2",
    # complex products are counted as the real ones that they are made of
    "complex32": "float16",
    "complex64": "float32",
    "complex128": "float64",
    # 8-bit integer products share one unit
    "uint8": "int8",
    "quint8": "int8",
    "qint8": "int8",
}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that one torch device can do in one dtype.

    flops_per_s   dense FLOP/s of matrix products; of a measured peak, what the best of the tried shapes reached
    dtype         as in Profile.by_dtype ("bfloat16"), or "tf32" where float32 operands run at that rate
    bytes_per_s   memory bandwidth; None where it is not known
    memory_bytes  the vendor's gigabytes, times 10^9. tdp_w: watts per torch device
    measured      measured on this machine instead of looked up
    """

    device: str
    dtype: str
    flops_per_s: int
    bytes_per_s: float | None = None
    memory_bytes: int | None = None
    tdp_w: float | None = None
    measured: bool = False
    source: str = ""
    date: str = ""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One row of the table: a device, and its dense FLOP/s by dtype (keys as in Profile.by_dtype, and "tf32").

    per: what the figures are of; confidence: how the row was checked; headline: what the vendor prints first.
    """

    id: str
    name: str
    vendor: str
    arch: str
    peaks: Mapping[str, int]
    bytes_per_s: float | None
    memory_bytes: int | None
    tdp_w: float | None
    units: int | None
    detect: tuple[str, ...]
    alias: tuple[str, ...]
    per: str
    headline: str
    source: str
    confidence: str
    note: str
    date: str
    _float8: tuple[str, ...] = field(default=(), repr=False)

    def peak(self, dtype: object = None) -> Peak:
        """The peak in `dtype` (see flopprof.peak). Raises NoPeak."""
        column = self.column(dtype)
        return Peak(
            device=self.name,
            dtype=column,
            flops_per_s=self.peaks[column],
            bytes_per_s=self.bytes_per_s,
            memory_bytes=self.memory_bytes,
            tdp_w=self.tdp_w,
            source=self.source,
            date=self.date,
        )

    def has(self, dtype: object) -> bool:
        """Whether the device has a peak in `dtype`."""
        try:
            return bool(self.column(dtype))
        except NoPeak:
            return False

    def column(self, dtype: object = None) -> str:
        """The key of `peaks` that operands of `dtype` use; None: the dtype that mixed precision trains in."""
        if dtype is None:
            return next(
                (name for name in _PREFERRED if name in self.peaks), max(self.peaks, key=self.peaks.__getitem__)
            )
        name = canonical(dtype)
        if name == "float8" and self._float8:
            name = self._float8[0]
        if name in self.peaks:
            return name
        raise NoPeak(
            f"{self.name} has no {name} peak in the table (it has {', '.join(self.peaks)}): "
            "choose one of these, or pass peak=... in FLOP/s."
        )


def canonical(dtype: object) -> str:
    """torch's name of a dtype, from what people type: `bf16` -> `bfloat16`; `fp8` stays the family `float8`."""
    name = str(dtype).strip().lower().removeprefix("torch.")
    if name in ("fp8", "float8"):
        return "float8"
    return _SHORT.get(name, name)


@functools.cache
def devices() -> tuple[Device, ...]:
    """Every row of the table, in the file's order."""
    text = importlib.resources.files("flopprof").joinpath("data", "peaks.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return tuple(_device(row, table["as_of"].isoformat()) for row in table["device"])


def _device(row: dict[str, Any], date: str) -> Device:  # TOML: values of any type
    peaks: dict[str, int] = {}
    float8 = tuple(row.get("float8", FLOAT8 if "float8" in row["tflops"] else ()))
    for name, tflops in row["tflops"].items():
        for key in float8 if name == "float8" else (canonical(name),):
            peaks[key] = round(tflops * _TERA)
    bandwidth = row.get("bandwidth_gb_s")
    return Device(
        id=row["id"],
        name=row["name"],
        vendor=row["vendor"],
        arch=row["arch"],
        peaks=MappingProxyType(peaks),
        bytes_per_s=None if bandwidth is None else float(bandwidth * _GIGA),
        memory_bytes=row["memory_gb"] * _GIGA,
        tdp_w=row.get("tdp_w"),
        units=row.get("units"),
        detect=tuple(row.get("detect", ())),
        alias=tuple(row.get("alias", ())),
        per=row.get("per", "torch device"),
        headline=row["headline"],
        source=row["source"],
        confidence=row["confidence"],
        note=row.get("note", ""),
        date=date,
        _float8=float8,
    )
