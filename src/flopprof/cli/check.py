"""`flopprof check`: does a model keep its budget? For continuous integration: exit code 1 where it does not."""

from __future__ import annotations

from typing import Annotated

import typer

from flopprof.cli.options import REPORT, AttentionPairs, Backward, Fold, Wanted, taken
from flopprof.cli.output import STDOUT, file_of, progress, read_bytes, require_outputs, show, write_text
from flopprof.errors import OverBudget

_BUDGET = "The budget"


@taken
def check(
    ctx: typer.Context,
    wanted: Wanted,
    *,
    backward: Backward = False,
    fold: Fold = True,
    attention: AttentionPairs = "full",
    max_flops: Annotated[
        str | None,
        typer.Option(
            help="Most FLOPs of forward (and backward, if asked): 4.2G, 7e9. One multiply-add is 2 FLOPs.",
            metavar="COUNT",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    max_params: Annotated[
        str | None,
        typer.Option(help="Most parameters, tied ones once: 26M.", metavar="COUNT", rich_help_panel=_BUDGET),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="A profile that flopprof count --json wrote: neither FLOPs nor parameters may exceed its own.",
            metavar="FILE",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    tolerance: Annotated[
        str,
        typer.Option(
            help="By how much the baseline may be exceeded: 0.5% or 0.005.", metavar="SHARE", rich_help_panel=_BUDGET
        ),
    ] = "0%",
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the verdict as JSON; - is standard output, instead of the lines.",
            metavar="FILE",
            rich_help_panel=REPORT,
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            help="Write the verdict and the model's charts as one page, which works offline; - as above.",
            metavar="FILE",
            rich_help_panel=REPORT,
        ),
    ] = None,
) -> None:
    """Check a model against a budget of FLOPs and parameters: exit code 0 within it, 1 beyond, the modules named."""
    from flopprof.compare.budget import Budget
    from flopprof.profile import Profile
    from flopprof.units import parse_count, parse_share

    require_outputs(file_of(wanted.target), wanted.routing, baseline, json=json, html=html)
    budget = Budget(
        max_flops=None if max_flops is None else parse_count(max_flops),
        max_params=None if max_params is None else parse_count(max_params),
        baseline=None if baseline is None else Profile.from_json(read_bytes(baseline), name=baseline),
        tolerance=parse_share(tolerance),
    )
    with progress(f"Counting {wanted.target}"):
        workload = wanted.load()
        profile = workload.count(backward=backward or wanted.checkpointing, attention=attention, fold=fold)
    verdict = budget.judge(profile)
    if json is not None:
        write_text(json, verdict.to_json())
    if html is not None:
        from flopprof.report.html.verdict import render as page

        write_text(html, page(verdict, profile, heading=workload.describe()))
    if STDOUT not in (json, html):
        from flopprof.report.verdict import render

        show(render(verdict, heading=workload.describe()))
    if verdict.excesses:
        figures = ", ".join(dict.fromkeys(excess.figure for excess in verdict.excesses))
        raise OverBudget(f"{wanted.target} is over its budget: {figures}.")
