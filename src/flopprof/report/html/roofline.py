"""Profile -> the roofline: what each kind of counted call does per byte that it moves, under a device's roof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from flopprof.hardware.table import Device, devices
from flopprof.profile import OperatorRow, Profile
from flopprof.report.html.elements import Head, escape, exact, figure, paragraph, table
from flopprof.report.html.page import Section
from flopprof.units import format_share

_EXAMPLE = "h100-sxm5"
_POINTS = 400
_ROWS = 15


def section(profile: Profile, hardware: Device | None = None) -> Iterator[Section]:
    """The scatter and its table; nothing where no counted call moves bytes.

    hardware: whose roof is shown first; without it that of one device as an example, and the page says so.
    """
    points = _points(profile)
    if not points:
        return
    dtypes = list(profile.by_dtype())
    roofs = [device for device in devices() if _fits(device, dtypes)]
    shown = hardware if hardware is not None and _fits(hardware, dtypes) else None
    example = shown or next((device for device in roofs if device.id == _EXAMPLE), roofs[0] if roofs else None)
    options = "".join(
        f'<option value="{escape(device.id)}"{" selected" if device is example else ""}>{escape(device.name)}</option>'
        for device in roofs
    )
    body = paragraph(
        "Each point is one kind of call: as high as it can run there, at the FLOPs that it does per byte moved (each "
        "operand read and each result written once). Under the slope the memory sets the pace, under the flat roof "
        "the arithmetic. No time was measured."
    )
    if roofs:
        body += (
            f'<div class="controls scripted-only"><label>Device <select id="device">{options}</select></label></div>'
        )
    if hardware is not None and shown is None:
        body += paragraph(f"{hardware.name} has no peak in the dtypes of this profile, or no known bandwidth.")
    if shown is None and example is not None:
        body += paragraph(f"No device was named: {example.name} is an example.", css="note")
    body += figure("roofline-chart", label="FLOP/s against FLOPs per byte; the table below has the points", height=440)
    body += '<p id="bound" class="note" role="status"></p>' + _table(profile, points[:_ROWS])
    left_out = profile.hardware_flops - sum(point["flops"] for point in points[:_POINTS])
    if left_out:
        share = format_share(left_out, profile.hardware_flops)
        body += paragraph(f"Not drawn: smaller kinds of calls, {left_out:,} FLOPs in all ({share}).", css="note")
    data = {
        "points": points[:_POINTS],
        "devices": {
            device.id: {
                "name": device.name,
                "bytes_per_s": device.bytes_per_s,
                "peaks": dict(device.peaks),
                "columns": {dtype: device.column(dtype) for dtype in dtypes if device.has(dtype)},
                "per": device.per,
                "date": device.date,
            }
            for device in roofs
        },
    }
    yield Section(anchor="roofline", title="Roofline", body=body, data={"roofline": data}, scripts=("roofline",))


def _fits(device: Device, dtypes: Sequence[str]) -> bool:
    return device.bytes_per_s is not None and any(device.has(dtype) for dtype in dtypes)


def _points(profile: Profile) -> list[dict[str, Any]]:
    """Calls of one operator with the same shapes, dtype and phase as one point, the most FLOPs first."""
    alike: defaultdict[tuple[object, ...], list[OperatorRow]] = defaultdict(list)
    for row in profile.operators:
        if row.flops and row.bytes:
            # of rows whose calls differ in what they add or skip, the intensity differs too
            alike[row.op, row.phase, row.dtype, row.shapes, row.flops * row.bytes // row.calls**2].append(row)
    points = [
        {
            "op": rows[0].op,
            "phase": rows[0].phase,
            "dtype": rows[0].dtype,
            "shapes": ", ".join("x".join(map(str, shape)) or "scalar" for shape in rows[0].shapes),
            "module": rows[0].fqn or "(root)",
            "modules": len({row.fqn for row in rows}),
            "calls": sum(row.calls for row in rows),
            "flops": sum(row.flops for row in rows),
            "bytes": sum(row.bytes for row in rows),
        }
        for rows in alike.values()
    ]
    return sorted(points, key=lambda point: -point["flops"])


def _table(profile: Profile, points: list[dict[str, Any]]) -> str:
    heads = [
        Head("Kind of call"),
        Head("Phase", number=False),
        Head("Shapes", number=False),
        Head("Calls"),
        Head("FLOPs"),
        Head("Moved", "bytes"),
        Head("Intensity", "FLOP/byte"),
        Head("Share"),
    ]
    rows = [
        [
            f"{point['op']} in {point['module']}"
            + (f" and {point['modules'] - 1} more" if point["modules"] > 1 else ""),
            point["phase"],
            f"{point['shapes']} {point['dtype']}",
            exact(point["calls"]),
            exact(point["flops"]),
            exact(point["bytes"]),
            f"{point['flops'] / point['bytes']:.4g}",
            format_share(point["flops"], profile.hardware_flops),
        ]
        for point in points
    ]
    return table(heads, rows, caption=f"The {len(rows)} kinds of calls with the most FLOPs, and their intensity")
