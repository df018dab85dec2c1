"""`flopprof crosscheck`: one model, several counters, every difference explained."""

from __future__ import annotations

from typing import Annotated

import typer

from flopprof.cli.options import Backward, Wanted, taken
from flopprof.cli.output import file_of, progress, require_outputs, show, write_text
from flopprof.errors import EnginesDisagree

_REPORT = "What is printed"
_NAMED = 5


@taken
def crosscheck(
    ctx: typer.Context,
    wanted: Wanted,
    *,
    backward: Backward = False,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write everything as JSON, in FLOPs; - is standard output, instead of the tables.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
) -> None:
    """Compare flopprof's engines, FlopCounterMode, fvcore and torchvision's published figures on one model.

    Every difference is told by operator. Exits with 1 where flopprof's own engines disagree.
    """
    require_outputs(file_of(wanted.target), wanted.routing, json=json)
    with progress(f"Cross-checking {wanted.target}"):
        from flopprof.crosscheck.check import crosscheck as check

        workload = wanted.load()
        result = check(workload, backward=backward or wanted.checkpointing)
    if json is not None:
        write_text(json, result.to_json())
    if json != "-":
        from flopprof.report.crosscheck import render

        show(render(result))
    if not result.agree:
        modules = list(dict.fromkeys(found.module or "(root)" for found in result.disagreements))
        more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
        guessing = {reading.counter for reading in result.readings if reading.own and reading.assumptions}
        guessed = guessing.issuperset(found.engine for found in result.disagreements)
        raise EnginesDisagree(
            f"flopprof's own engines disagree on {wanted.target} in {', '.join(modules[:_NAMED])}{more}: "
            f"{'one of them had to assume something, see there.' if guessed else 'please report it.'}"
        )
