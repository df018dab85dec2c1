"""Runs of a meter -> their figures, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.meter.runs import Run, world_of_runs
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid


def render(runs: Sequence[tuple[str, Run]]) -> RenderableType:
    """One report of each (file, run); before them, where they are ranks of one run, all devices together."""
    parts: list[RenderableType] = []
    world = world_of_runs([run for _name, run in runs])
    if world is not None:
        parts += [Text("All ranks", style="bold"), Text(), Facts(world.facts())]
    for name, run in runs:
        if parts:
            parts.append(Text())
        heading = name if run.world_size == 1 else f"{name}, rank {run.rank} of {run.world_size}"
        parts += [Text(heading, style="bold", overflow="fold"), Text(), Facts(list(_facts(run))), Text(), _times(run)]
    return Group(*parts)


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    yield from (line for line in run.summary.facts() if line[0] != "time")
    yield from run.facts()


def _times(run: Run) -> RenderableType:
    whole = run.wall_s or 1.0
    rows = [
        [name.replace("_", " "), f"{seconds:.3f}", f"{100 * seconds / whole:.1f}%"]
        for name, seconds in run.rows.items()
        if seconds or name == "steps"
    ]
    rows.append(["= wall clock", f"{run.wall_s:.3f}", "100.0%"])
    return Grid([Column("Where the time went", number=False, elastic=True), Column("s"), Column("Share")], rows)
