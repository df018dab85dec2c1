"""`flopprof report`: what the records of a run add up to."""

from __future__ import annotations

from typing import Annotated

import typer

from flopprof.cli.options import Traceback
from flopprof.cli.output import STDOUT, require_outputs, show, write_text

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
    html: Annotated[
        str | None,
        typer.Option(
            help="Write one page with charts of MFU, time and throughput by step, which works offline; - as above.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Sum up the steps that a run recorded: MFU, throughput, restarts, and where the time went."""
    ctx.meta["flopprof.traceback"] = traceback
    require_outputs(*files, json=json, html=html)
    import msgspec

    from flopprof.meter.runs import run_of

    runs = [(name, run_of(name)) for name in files]
    if json is not None:
        write_text(json, msgspec.json.encode([{"file": name, "run": run} for name, run in runs]).decode())
    if html is not None:
        from flopprof.meter.records import read
        from flopprof.report.html.meter import render as page

        title = files[0] if len(files) == 1 else f"{len(files)} runs"
        write_text(html, page([(name, run, read(name)) for name, run in runs], title=title))
    if STDOUT not in (json, html):
        from flopprof.report.meter import render

        show(render(runs))
