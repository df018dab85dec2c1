"""`flopprof count`: a model's FLOPs by module and operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flopprof.cli.files import Files
from flopprof.cli.inference import Generation
from flopprof.cli.options import AttentionPairs, Backward, Fold, Wanted, taken
from flopprof.cli.output import file_of, progress, show
from flopprof.errors import UncountedOperators

if TYPE_CHECKING:
    from flopprof.profile import Profile

_REPORT = "What is printed"


@taken
def count(
    ctx: typer.Context,
    wanted: Wanted,
    *,
    backward: Backward = False,
    fold: Fold = True,
    attention: AttentionPairs = "full",
    depth: Annotated[
        int,
        typer.Option(help="Levels of modules below the root.", metavar="D", min=0, rich_help_panel=_REPORT),
    ] = 3,
    by: Annotated[
        Literal["module", "operator", "both", "line"],
        typer.Option(help="Which tables; line: per line of the model's source code.", rich_help_panel=_REPORT),
    ] = "both",
    unit: Annotated[
        Literal["flop", "mac"],
        typer.Option(
            help="Unit of the counts: FLOPs, or MACs (multiply-adds; 1 MAC = 2 FLOPs).", rich_help_panel=_REPORT
        ),
    ] = "flop",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with 1, printing nothing, if an operator has no formula.", rich_help_panel=_REPORT
        ),
    ] = False,
    generation: Generation,
    files: Files,
) -> None:
    """Count a model's FLOPs: by module, by operator, and in total. One multiply-add is 2 FLOPs."""
    files.spare(file_of(wanted.target), wanted.routing)
    if generation.asked:
        generation.run(ctx, wanted, files, attention=attention, fold=fold, strict=strict)
        return
    roof = generation.roof(files.html)
    with progress(f"Counting {wanted.target}"):
        workload = wanted.load()
        profile = workload.count(
            backward=backward or wanted.checkpointing, attention=attention, lines=by == "line", fold=fold
        )
    if strict and profile.uncounted:
        raise UncountedOperators(
            f"{wanted.target} runs operators that have no formula: {', '.join(profile.uncounted)}. "
            "Give each one with flopprof.register_formula, or leave --strict out."
        )
    mismatch = workload.stored().get("mismatch")
    if mismatch is not None and files.take_stdout:
        typer.echo(f"flopprof: {mismatch}", err=True)
    heading = f"{workload.describe()}, {profile.device}"
    files.write(profile, heading=heading, depth=depth, hardware=roof)
    if not files.take_stdout:
        from flopprof.report.console import render

        sources = _sources(profile) if by == "line" else None
        report = render(
            profile, heading=heading, depth=depth, by=by, unit=unit, sources=sources, stored=workload.stored()
        )
        show(report)


def _sources(profile: Profile) -> dict[str, str]:
    """The text of every source line that the profile names."""
    from flopprof.counting.lines import source_text

    return {line: source_text(line) for line in profile.by_line()}
