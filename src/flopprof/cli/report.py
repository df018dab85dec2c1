"""`flopprof report`: what the records of a run add up to."""

from __future__ import annotations

from typing import Annotated

import typer

from flopprof.cli.options import Traceback
from flopprof.cli.output import console, require_writable, write_text

_REPORT = "What is printed"


def report(
    ctx: typer.Context,
    files: Annotated[
        list[str],
        typer.Argument(
            help="Records that flopprof.Meter(records=...) or flopprof run wrote; of several ranks, each one's file.",
            metavar="FILE...",
            show_default=False,
        ),
    ],
    *,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the figures of every file as JSON; - is standard output, instead of the report.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Sum up the steps that a run recorded: MFU, throughput, restarts, and where the time went."""
    ctx.meta["flopprof.traceback"] = traceback
    require_writable(json)
    import msgspec

    from flopprof.meter.runs import run_of

    runs = [(name, run_of(name)) for name in files]
    if json is not None:
        write_text(json, msgspec.json.encode([{"file": name, "run": run} for name, run in runs]).decode())
    if json != "-":
        from flopprof.report.meter import render

        console().print(render(runs), crop=False)
