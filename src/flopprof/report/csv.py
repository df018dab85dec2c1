"""Profile -> CSV: one row per module, phase and operator."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from flopprof.profile import Profile

COLUMNS = (
    "module",
    "class",
    "phase",
    "operator",
    "kind",
    "dtype",
    "shapes",
    "parameter",
    "calls",
    "flops",
    "macs",
    "flops_full",
    "flops_causal",
    "bytes",
)


def to_csv(profile: Profile) -> str:
    """The operators by module, columns as in COLUMNS.

    kind is counted, elementwise or uncounted; an uncounted row has no flops. Elementwise FLOPs are apart: sum
    the counted rows for hardware_flops. shapes: `2x8 8x4`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(profile))
    return text.getvalue()


def _rows(profile: Profile) -> Iterator[Sequence[str | int]]:
    classes = {row.fqn: row.cls for row in profile.modules}
    for row in profile.operators:
        yield (
            row.fqn,
            classes.get(row.fqn, ""),
            row.phase,
            row.op,
            "counted",
            row.dtype,
            _shapes(row.shapes),
            row.parameter,
            row.calls,
            row.flops,
            row.flops // 2,
            row.flops_full,
            row.flops_causal,
            row.bytes,
        )
    for extra in profile.elementwise:
        where = (extra.fqn, classes.get(extra.fqn, ""), extra.phase, extra.op)
        yield *where, "elementwise", "", "", "", extra.calls, extra.flops, "", "", "", ""
    for hole in profile.uncounted_rows:
        where = (hole.fqn, classes.get(hole.fqn, ""), hole.phase, hole.op)
        yield *where, "uncounted", "", _shapes(hole.shapes), "", hole.calls, "", "", "", "", ""


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
