"""`flopprof diff`: what changed between two saved profiles."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flopprof.cli.options import REPORT, Traceback
from flopprof.cli.output import STDOUT, read_bytes, require_outputs, show, write_text
from flopprof.errors import UsageError


def diff(
    ctx: typer.Context,
    before: Annotated[str, typer.Argument(help="A profile that flopprof count --json wrote.", metavar="BEFORE")],
    after: Annotated[str, typer.Argument(help="Another one; - is standard input.", metavar="AFTER")],
    *,
    phase: Annotated[
        Literal["forward", "backward", "recompute", "optimizer"] | None,
        typer.Option(help="Operators and modules of one phase only; default: all together.", rich_help_panel=REPORT),
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Most rows in each table, the largest changes first.", min=1, rich_help_panel=REPORT)
    ] = 20,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write every change as JSON; - is standard output, instead of the tables.",
            metavar="FILE",
            rich_help_panel=REPORT,
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            help="Write one page of charts and tables, which works offline; - as above.",
            metavar="FILE",
            rich_help_panel=REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Show what changed between two profiles: totals, operators and modules, in FLOPs. Exit code 0 either way."""
    ctx.meta["flopprof.traceback"] = traceback
    require_outputs(before, after, json=json, html=html)
    if before == after == STDOUT:
        raise UsageError("both profiles are to come from standard input: give one of them as a file.")
    from flopprof.compare.difference import diff as compare
    from flopprof.profile import Profile

    first, second = (Profile.from_json(read_bytes(path), name=path) for path in (before, after))
    difference = compare(first, second, phase=phase)
    if json is not None:
        write_text(json, difference.to_json())
    if html is not None:
        from flopprof.report.html.difference import render as page

        write_text(html, page(difference))
    if STDOUT not in (json, html):
        from flopprof.report.difference import render

        show(render(difference, rows=rows))
