"""Profile -> table of source lines: which line of whose code the FLOPs come from, and in which modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Literal

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.profile import PHASES, Profile
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import common_step, format_fixed, format_share, unit_name

_NUMBER = re.compile(r"(?<![^._-])[0-9]+(?![^.])")  # layers.3, encoder_layer_3, block1-3; not conv3
_UNKNOWN = "(unknown)"
_ROOT = "(root)"


def lines_table(
    profile: Profile, sources: Mapping[str, str] | None = None, *, unit: Literal["flop", "mac"] = "flop"
) -> RenderableType:
    """One row per line and module, the dearest line first, under each line its source.

    sources: line (`path/model.py:123`) -> its text. Numbered modules that share a line and everything else of their
    name are one row: `layers.0..31.mlp`.
    """
    cells = _cells(profile)
    if not cells:
        return Text("No counted operator ran.")
    phases = [i for i, phase in enumerate(PHASES) if phase == "forward" or profile.by_phase()[phase]]
    divisor = 2 if unit == "mac" else 1
    step = common_step(flops // divisor for flops in profile.by_phase().values())
    name = unit_name(step, "MACs" if unit == "mac" else "FLOPs")
    columns = [
        Column("Line", number=False, elastic=True),
        Column("Module", number=False, elastic=True),
        *(Column(f"{PHASES[i].capitalize()}\n{name}") for i in phases),
        Column("Share"),
    ]
    rows: list[Sequence[str]] = []
    shown = _short_names(cells)
    for line in sorted(cells, key=lambda line: (-sum(map(sum, cells[line].values())), line)):
        first = shown[line]
        for module, flops in sorted(cells[line].items(), key=lambda item: -sum(item[1])):
            numbers = [format_fixed(flops[i] // divisor, step) for i in phases]
            rows.append([first, module, *numbers, format_share(sum(flops), profile.hardware_flops)])
            first = ""
        if text := (sources or {}).get(line, ""):
            rows.append([f"    {text}"])
    files = sorted({line.rpartition(":")[0] for line in cells} - {""})
    return Group(Grid(columns, rows), Text(), Facts([("files" if not i else "", file) for i, file in enumerate(files)]))


def _cells(profile: Profile) -> dict[str, dict[str, list[int]]]:
    """line -> folded module -> FLOPs by phase."""
    cells: dict[str, dict[str, list[int]]] = {}
    for row in profile.operators:
        flops = cells.setdefault(row.line, {}).setdefault(row.fqn, [0] * len(PHASES))
        flops[PHASES.index(row.phase)] += row.flops
    return {line: _folded(modules) for line, modules in cells.items()}


def _folded(modules: Mapping[str, list[int]]) -> dict[str, list[int]]:
    alike: dict[str, list[str]] = {}
    for fqn in modules:
        alike.setdefault(_NUMBER.sub("*", fqn), []).append(fqn)
    return {
        fold_names(fqns) or _ROOT: [sum(column) for column in zip(*(modules[fqn] for fqn in fqns), strict=True)]
        for fqns in alike.values()
    }


def fold_alike(fqns: Sequence[str]) -> list[str]:
    """Names, those that differ in numbers only as one (see fold_names), in the order of the first of each."""
    alike: dict[str, list[str]] = {}
    for fqn in fqns:
        alike.setdefault(_NUMBER.sub("*", fqn), []).append(fqn)
    return [fold_names(names) or _ROOT for names in alike.values()]


def fold_names(fqns: Sequence[str]) -> str:
    """Names that differ in numbers only, as one: `layers.0..31.mlp`, or `layers.*.mlp` where some are left out."""
    places = [sorted(set(values)) for values in zip(*(map(int, _NUMBER.findall(fqn)) for fqn in fqns), strict=True)]
    complete = prod(map(len, places)) == len(set(fqns))
    spans = iter(_span(values) if complete or len(values) == 1 else "*" for values in places)
    return _NUMBER.sub(lambda _: next(spans), fqns[0])


def _span(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    return f"{values[0]}..{values[-1]}" if values[-1] - values[0] == len(values) - 1 else "*"


def _short_names(lines: Iterable[str]) -> dict[str, str]:
    """Each line with as little of its path as tells its file from the others."""
    files = {line.rpartition(":")[0] for line in lines}
    short: dict[str, str] = {}
    for file in files:
        parts = file.split("/")
        for length in range(1, len(parts) + 1):
            short[file] = "/".join(parts[-length:])
            if not any(f"/{other}".endswith(f"/{short[file]}") for other in files if other != file):
                break
    names = {line: line.rpartition(":") for line in lines}
    return {line: f"{short[file]}:{number}" if file else _UNKNOWN for line, (file, _, number) in names.items()}
