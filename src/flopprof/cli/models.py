"""`flopprof models`: the models that are known by name."""

from __future__ import annotations

from typing import Annotated

import typer

from flopprof.cli.options import Traceback
from flopprof.cli.output import require_writable, show, write_text
from flopprof.errors import UnknownTarget

_REPORT = "What is printed"


def models(
    ctx: typer.Context,
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="Part of a name, family or kind (llama, vision), or a glob over names ('qwen3-*'); default: all.",
            metavar="[PATTERN]",
            show_default=False,
        ),
    ] = None,
    *,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write every row whole as JSON, source and date too; - is standard output, instead of the table.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """List the models that can be counted by name, offline: their parameters and forward FLOPs per token."""
    ctx.meta["flopprof.traceback"] = traceback
    require_writable(json)
    from flopprof.models import catalogue

    found = catalogue.find(pattern)
    if not found:
        raise UnknownTarget(f"no model of the catalogue matches {pattern!r}: `flopprof models` lists them all.")
    if json is not None:
        write_text(json, catalogue.to_json(found))
    if json != "-":
        from flopprof.report.models import Line, render

        lines = [
            Line(
                name=entry.name,
                family=entry.family,
                parameters=entry.parameters,
                active=entry.active,
                flops=cost.flops,
                per=cost.per,
                tokens=cost.tokens,
                image=cost.image,
                seconds=cost.seconds,
                counted=cost.by == "count",
                runs_every_expert=entry.runs_every_expert,
            )
            for entry, cost in ((entry, entry.cost()) for entry in found)
        ]
        show(render(lines))
