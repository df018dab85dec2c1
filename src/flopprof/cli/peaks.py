"""`flopprof peaks`: what devices can do at most, from the table or measured here."""

from __future__ import annotations

import dataclasses
import functools
import json as json_module
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flopprof.cli.options import Traceback
from flopprof.cli.output import require_writable, show, write_text
from flopprof.errors import NoPeak, UsageError

if TYPE_CHECKING:
    from flopprof.hardware.sweep import Measurement, Timing
    from flopprof.hardware.table import Device, Peak

_REPORT = "What is printed"
_MEASURE = "What is measured"
_SCHEMA = "flopprof.peaks/1"
_MEASURED = ("float32", "tf32", "bfloat16", "float16", "float8")


def peaks(
    ctx: typer.Context,
    device: Annotated[
        str | None,
        typer.Argument(
            help="A device by the name one types (H100, 'RTX 4090', A100-40GB) or by the one its driver reports; "
            "cuda, cuda:1, mps, xpu, cpu: the one that is here. Default: all, or with --measure the one that is here.",
            metavar="[DEVICE]",
            show_default=False,
        ),
    ] = None,
    *,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="bf16, fp16, fp32, tf32, fp8, fp4, int8, fp64: devices by that rate. With --measure: what is "
            "measured; repeat per dtype; default: fp32, tf32, bf16, fp16 and fp8 where they exist.",
            metavar="DTYPE",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what matrix products reach here.", rich_help_panel=_MEASURE)
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            help="Per shape: 20 runs, or as many as fit, but at least 3.", metavar="S", rich_help_panel=_MEASURE
        ),
    ] = 1.0,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write everything as JSON, in FLOP/s; - is standard output, instead of the table.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """List the dense peak of devices, with bandwidth, memory, TDP and source; or measure this machine's own."""
    ctx.meta["flopprof.traceback"] = traceback
    require_writable(json)
    if measure:
        _measure(device, dtype or (), seconds, json)
        return
    if dtype and len(dtype) > 1:
        raise UsageError(f"one --dtype at a time, got {' and '.join(dtype)}; several only with --measure.")
    _look_up(device, dtype[0] if dtype else None, json)


def _look_up(name: str | None, dtype: str | None, json: str | None) -> None:
    from flopprof import hardware

    devices = hardware.devices() if name is None else (hardware.device(name),)
    if dtype is not None and name is None:
        devices = tuple(row for row in devices if row.has(dtype))
        if not devices:
            choices = "bf16, fp16, fp32, tf32, fp8, fp4, int8, fp64"
            raise UsageError(f"no device of the table has {dtype!r}: choose {choices}.")
    elif dtype is not None:
        devices[0].peak(dtype)
    if json is not None:
        rows = [_row(row, dtype) for row in devices]
        write_text(json, json_module.dumps({"schema": _SCHEMA, "devices": rows}, indent=1, ensure_ascii=False))
    if json != "-":
        from flopprof.report.peaks import render_device, render_dtype, render_table

        page = (
            render_device(devices[0], dtype)
            if name is not None
            else render_table(devices)
            if dtype is None
            else render_dtype(devices, dtype)
        )
        show(page)


def _measure(name: str | None, dtypes: list[str] | tuple[str, ...], seconds: float, json: str | None) -> None:
    from flopprof.hardware.measure import measure
    from flopprof.report.peaks import render_measured

    found: list[Measurement] = []
    refused: list[tuple[str, str]] = []
    for dtype in dtypes or _MEASURED:
        tell = functools.partial(_tell, dtype) if sys.stderr.isatty() else None
        try:
            found.append(measure(name, dtype, seconds=seconds, progress=tell))
        except NoPeak as error:
            if dtypes:
                raise
            refused.append((dtype, str(error)))
    if json is not None:
        document = {"schema": _SCHEMA, "measured": [_measured(each) for each in found]}
        write_text(json, json_module.dumps(document, indent=1, ensure_ascii=False))
    if json != "-":
        show(render_measured(found, refused, [_known(each, name) for each in found]))


def _tell(dtype: str, timing: Timing) -> None:
    from flopprof.report.peaks import line_of

    shape, median, rate, spread, runs = line_of(timing)
    typer.echo(f"{dtype} {shape}: {rate} TFLOP/s, {median} ms, spread {spread}, {runs} runs", err=True)


def _known(measured: Measurement, name: str | None) -> Peak | None:
    """The table's peak of what was measured, if it is there."""
    from flopprof import hardware
    from flopprof.errors import UnknownDevice

    try:
        return hardware.device(name).peak(measured.dtype)
    except (UnknownDevice, NoPeak):
        return None


def _row(device: Device, dtype: str | None) -> dict[str, Any]:  # JSON: values of any kind
    peaks = dict(device.peaks) if dtype is None else {device.column(dtype): device.peak(dtype).flops_per_s}
    return {
        "id": device.id,
        "name": device.name,
        "vendor": device.vendor,
        "arch": device.arch,
        "dense_flops_per_s": peaks,
        "bytes_per_s": device.bytes_per_s,
        "memory_bytes": device.memory_bytes,
        "tdp_w": device.tdp_w,
        "compute_units": device.units,
        "per": device.per,
        "reported_as": device.detect,
        "typed_as": device.alias,
        "vendor_prints": device.headline,
        "source": device.source,
        "confidence": device.confidence,
        "note": device.note,
        "date": device.date,
    }


def _measured(found: Measurement) -> dict[str, Any]:
    return {
        "peak": dataclasses.asdict(found.peak),
        "torch_version": found.torch_version,
        "threads": found.threads,
        "shapes": [
            {
                "m_k_n": timing.shape,
                "repetitions": timing.repetitions,
                "median_s": timing.median_s,
                "q1_s": timing.q1_s,
                "q3_s": timing.q3_s,
                "flops_per_s": timing.flops_per_s,
            }
            for timing in found.timings
        ],
    }
