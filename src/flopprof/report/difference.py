"""Difference -> what `flopprof diff` prints: totals, operators and modules that changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.compare.difference import Change, Difference
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import common_step, format_fixed, unit_name

_UNITS = {"bytes_moved": "B", "n_params": "", "n_params_trainable": ""}


def render(difference: Difference, *, rows: int = 20) -> RenderableType:
    """The whole report as one renderable; width, colour and file are its printer's. rows: the most in each table."""
    phase = f", {difference.phase} only" if difference.phase else ""
    heading = f"{difference.before or '(unnamed)'} -> {difference.after or '(unnamed)'}{phase}"
    parts: list[RenderableType] = [Text(heading, style="bold", overflow="fold"), Text(), _totals(difference)]
    if difference.same:
        return Group(*parts, Text(), Text("No figure differs."))
    for title, changes in (
        ("Operator", difference.operators),
        ("Module, without children", difference.own),
    ):
        if changes:
            parts += [Text(), *_table(title, changes, rows, "FLOPs")]
    if difference.parameters:
        parts += [Text(), *_table("Module, with children", difference.parameters, rows, "params")]
    if difference.uncounted:
        parts += [Text(), *_table("Uncounted operator", difference.uncounted, rows, "calls")]
    parts += [Text(), Facts([("convention", "1 multiply-add = 2 FLOPs; a delta is after - before")])]
    return Group(*parts)


def _totals(difference: Difference) -> RenderableType:
    rows = []
    for change in (*difference.phases, *difference.totals):
        if not (change.before or change.after):
            continue
        unit = _UNITS.get(change.name, "FLOPs")
        step = common_step([change.before or 0, change.after or 0])
        rows.append([change.name.replace("_", " "), *_cells(change, step), unit_name(step, unit)])
    columns = [Column("Total", number=False), *_COLUMNS, Column("Unit", number=False)]
    return Grid(columns, rows)


_COLUMNS = (Column("Before"), Column("After"), Column("Delta"), Column("Change"))


def _table(title: str, changes: Sequence[Change], most: int, unit: str) -> Iterator[RenderableType]:
    step = common_step([value for change in changes for value in (change.before or 0, change.after or 0)])
    name = unit_name(step, unit) if unit == "FLOPs" else f"{unit_name(step, '')} {unit}".strip()
    columns = [
        Column(title, number=False, elastic=True),
        *(_under(column, name) for column in _COLUMNS[:3]),
        _COLUMNS[3],
    ]
    yield Grid(columns, [[change.name or "(root)", *_cells(change, step)] for change in changes[:most]])
    if len(changes) > most:
        yield Facts([("", f"({len(changes) - most} more with smaller changes: --rows {len(changes)} shows them all.)")])


def _under(column: Column, unit: str) -> Column:
    return Column(f"{column.head}\n{unit}")


def _cells(change: Change, step: int) -> list[str]:
    sign = "+" if change.delta > 0 else ""
    return [
        "absent" if change.before is None else format_fixed(change.before, step),
        "absent" if change.after is None else format_fixed(change.after, step),
        f"{sign}{format_fixed(change.delta, step)}",
        _share(change),
    ]


def _share(change: Change) -> str:
    if change.kind in ("added", "removed"):
        return change.kind
    if not change.before:
        return ""
    return f"{100 * change.delta / change.before:+.1f}%"
