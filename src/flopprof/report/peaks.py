"""Peaks as tables: what the table of devices says, and what a measurement found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.hardware.sweep import Measurement, Timing
from flopprof.hardware.table import Device, Peak
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid

_GIGA, _TERA = 10**9, 10**12
_MILLI, _MICRO = 10**3, 10**6
# the columns of the wide table: a head, and the keys of Device.peaks of which one fills it
_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz")
_SHORT = {
    "fp32": ("float32",),
    "tf32": ("tf32",),
    "fp16": ("float16",),
    "bf16": ("bfloat16",),
    "fp8": _FLOAT8,
    "fp64": ("float64",),
    "int8": ("int8",),
    "fp4": ("float4_e2m1fn_x2",),
}
_DENSE = "dense, of matrix products; a multiply-add is 2 FLOPs; with 2:4 sparsity vendors print twice as much"


def render_table(devices: Sequence[Device]) -> RenderableType:
    """Every device on one line: its dense TFLOP/s by dtype, bandwidth, memory and power."""
    optional = ("fp64", "int8", "fp4")
    columns = [
        Column("Device\n ", number=False, elastic=True),
        *(Column(head, optional=head in optional) for head in _SHORT),
        Column("Memory\nGB/s"),
        Column("\nGB"),
        Column("TDP\nW"),
    ]
    rows: list[list[str]] = []
    vendor = ""
    for device in devices:
        if device.vendor != vendor:
            vendor = device.vendor
            rows.append([vendor])
        rates = [next((device.peaks[key] for key in keys if key in device.peaks), None) for keys in _SHORT.values()]
        rows.append(
            [
                f" {device.name.removeprefix(vendor).strip()}{_mark(device)}",
                *map(format_tera, rates),
                *_memory(device),
                _watts(device),
            ]
        )
    facts = [
        ("TFLOP/s", f"{_DENSE}; int8 in TOP/s"),
        ("fp64, fp32", "at the rate of the matrix units where they take the type"),
        ("tf32", "float32 operands, where torch is set to it"),
    ]
    if any(device.per != "torch device" for device in devices):
        facts.append(("*", "not per torch device, or not from the vendor: `flopprof peaks DEVICE` says more"))
    facts.append(("as of", f"{max(device.date for device in devices)}; sources: `flopprof peaks DEVICE`, or --json -"))
    return Group(Grid(columns, rows), Text(), Facts(facts))


def render_dtype(devices: Sequence[Device], dtype: str) -> RenderableType:
    """The devices that have `dtype`, fastest first, with what follows from the rate."""
    peaks = sorted(((device.peak(dtype), device) for device in devices), key=lambda pair: -pair[0].flops_per_s)
    columns = [
        Column("Device\n ", number=False, elastic=True),
        Column("Peak\nTFLOP/s"),
        Column("Memory\nGB/s"),
        Column("Ridge\nFLOP/byte"),
        Column("Memory\nGB"),
        Column("TDP\nW"),
        Column("Peak / TDP\nTFLOP/J"),
    ]
    rows = [
        [
            f"{peak.device}{_mark(device)}",
            format_tera(peak.flops_per_s),
            _memory(device)[0],
            _ridge(peak),
            _memory(device)[1],
            _watts(device),
            "-" if peak.tdp_w is None else f"{peak.flops_per_s / peak.tdp_w / _TERA:.2f}",
        ]
        for peak, device in peaks
    ]
    facts = [
        (dtype, _DENSE),
        ("Ridge", "a product that does fewer FLOPs per byte moved is bound by memory"),
        ("as of", f"{max(device.date for device in devices)}; sources: `flopprof peaks DEVICE`, or --json -"),
    ]
    return Group(Grid(columns, rows), Text(), Facts(facts))


def render_device(device: Device, dtype: str | None = None) -> RenderableType:
    """One device: each dtype (or the one asked for), and where the figures come from."""
    columns = [Column("Dtype\n ", number=False), Column("Peak\nTFLOP/s"), Column("Ridge\nFLOP/byte")]
    peaks = [device.peak(name) for name in (device.peaks if dtype is None else [dtype])]
    rows = [[peak.dtype, format_tera(peak.flops_per_s), _ridge(peak)] for peak in peaks]
    memory = "unknown" if device.bytes_per_s is None else f"{_memory(device)[0]} GB/s"
    facts = [
        ("TFLOP/s", f"per {device.per}; {_DENSE}"),
        ("memory", f"{_memory(device)[1]} GB, {memory}"),
        ("TDP", "unknown" if device.tdp_w is None else f"{_watts(device)} W"),
        ("reported as", "; ".join(device.detect) or "never: no torch device has this name"),
        ("typed as", ", ".join((device.id, *device.alias))),
        ("vendor prints", device.headline),
        ("source", f"{device.source} ({device.confidence}; {device.date})"),
    ]
    if device.note:
        facts.append(("note", device.note))
    title = f"{device.vendor} {device.name.removeprefix(device.vendor).strip()}, {device.arch}"
    return Group(Text(title), Text(), Grid(columns, rows), Text(), Facts(facts))


def render_measured(
    measurements: Sequence[Measurement], refused: Sequence[tuple[str, str]], table: Sequence[Peak | None]
) -> RenderableType:
    """What was measured, shape by shape; refused: dtype and reason; table: the peaks known of it."""
    columns = [
        Column("Dtype\n ", number=False),
        Column("(m, k) @ (k, n)\n "),
        Column("Median\nms"),
        Column("Rate\nTFLOP/s"),
        Column("Spread\n "),
        Column("Runs\n "),
        Column("", number=False),
    ]
    rows = [
        [found.dtype, *line_of(timing), "best" if timing is found.best else ""]
        for found in measurements
        for timing in found.timings
    ]
    rows += [[f"{dtype}: {reason}"] for dtype, reason in refused]
    facts = [("measured", "random normal numbers, warmed up; median of the runs; spread: middle half over median")]
    for found, known in zip(measurements, table, strict=True):
        best = f"{format_tera(found.peak.flops_per_s)} TFLOP/s"
        if known is not None:
            share = found.peak.flops_per_s / known.flops_per_s
            best += f", {share:.1%} of the {format_tera(known.flops_per_s)} of the table"
        facts.append((found.dtype, best))
    if measurements:
        first = measurements[0]
        threads = "" if first.threads is None else f", {first.threads} threads"
        facts.append(("on", f"{first.device}{threads}, torch {first.torch_version}, {first.date}"))
    return Group(Grid(columns, rows), Text(), Facts(facts))


def line_of(timing: Timing) -> list[str]:
    """One shape: its sizes, median in ms, TFLOP/s, spread, runs."""
    return [
        " x ".join(map(str, timing.shape)),
        f"{timing.median_s * _MILLI:.3f}",
        format_tera(timing.flops_per_s),
        f"{timing.spread:.1%}",
        str(timing.repetitions),
    ]


def format_tera(flops_per_s: float | None) -> str:
    """TFLOP/s without trailing zeros, as vendors print them: `989.4`, `0.254`; `-` where there is none."""
    if flops_per_s is None:
        return "-"
    tera = flops_per_s / _TERA
    digits = 1 if tera >= 100 else 2 if tera >= 10 else 3
    return f"{tera:.{digits}f}".rstrip("0").rstrip(".")


def _ridge(peak: Peak) -> str:
    return "-" if peak.bytes_per_s is None else f"{peak.flops_per_s / peak.bytes_per_s:.0f}"


def _memory(device: Device) -> tuple[str, str]:
    rate = "-" if device.bytes_per_s is None else f"{device.bytes_per_s / _GIGA:.0f}"
    return rate, "-" if device.memory_bytes is None else f"{device.memory_bytes // _GIGA}"


def _watts(device: Device) -> str:
    return "-" if device.tdp_w is None else f"{device.tdp_w:.0f}"


def _mark(device: Device) -> str:
    return "" if device.per == "torch device" else " *"
