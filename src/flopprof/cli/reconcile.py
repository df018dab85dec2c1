"""`flopprof reconcile`: why a model's FLOPs are not 2 N T or 6 N T."""

from __future__ import annotations

from typing import Annotated

import typer

from flopprof.cli.options import RUN, AttentionPairs, Backward, Wanted, taken
from flopprof.cli.output import STDOUT, file_of, progress, require_outputs, show, write_text

_REPORT = "What is printed"


@taken
def reconcile(
    ctx: typer.Context,
    wanted: Wanted,
    *,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="T, where it is not the number of integers in the first input, or of samples.",
            metavar="T",
            min=1,
            rich_help_panel=RUN,
        ),
    ] = None,
    backward: Backward = False,
    attention: AttentionPairs = "full",
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the ledger as JSON, in FLOPs; - is standard output, instead of the table.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            help="Write one page of charts and tables, which works offline; - is standard output.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
) -> None:
    """Tell why a model's FLOPs differ from 2 N T (forward) and 6 N T (training), to the last FLOP."""
    require_outputs(file_of(wanted.target), wanted.routing, json=json, html=html)
    with progress(f"Reconciling {wanted.target}"):
        workload = wanted.load()
        profile = workload.count(backward=backward or wanted.checkpointing, attention=attention)
        ledger = profile.reconcile(tokens)
    if json is not None:
        write_text(json, ledger.to_json())
    if html is not None:
        from flopprof.report.html.profile import render_reconciled

        heading = f"{workload.describe()}, {profile.device}"
        write_text(html, render_reconciled(profile, ledger, heading=heading))
    if STDOUT not in (json, html):
        from flopprof.report.ledger import render

        show(render(ledger, heading=f"{wanted.target}, {workload.describe()}"))
