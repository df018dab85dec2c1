"""`flopprof count`: a model's FLOPs by module and operator."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flopprof.cli.options import (
    AttentionPairs,
    AudioSeconds,
    Backward,
    Batch,
    Device,
    Dtype,
    Fold,
    Images,
    ImageSize,
    Inputs,
    ModelArgs,
    Seq,
    Target,
    Traceback,
    Train,
    TrustRemoteCode,
)
from flopprof.cli.output import console, progress, require_writable, write_text
from flopprof.errors import UncountedOperators, UsageError

if TYPE_CHECKING:
    from flopprof.profile import Profile

_REPORT = "What is printed"


def count(
    ctx: typer.Context,
    target: Target,
    *,
    batch: Batch = 1,
    seq: Seq = None,
    image_size: ImageSize = None,
    audio_seconds: AudioSeconds = None,
    images: Images = 1,
    inputs: Inputs = None,
    backward: Backward = False,
    train: Train = False,
    fold: Fold = True,
    attention: AttentionPairs = "full",
    device: Device = None,
    dtype: Dtype = None,
    model_args: ModelArgs = None,
    trust_remote_code: TrustRemoteCode = False,
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
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the whole profile as JSON; - is standard output, instead of the tables.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    csv: Annotated[
        str | None,
        typer.Option(
            help="Write one row per module and operator, in FLOPs; - is standard output, instead of the tables.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with 1, printing nothing, if an operator has no formula.", rich_help_panel=_REPORT
        ),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Count a model's FLOPs: by module, by operator, and in total. One multiply-add is 2 FLOPs."""
    ctx.meta["flopprof.traceback"] = traceback
    if json == csv == "-":
        raise UsageError("--json - and --csv - both ask for standard output: give one of them a file.")
    arguments = dict(parse_model_arg(text) for text in model_args or ())
    for path in (json, csv):
        require_writable(path)

    with progress(f"Counting {target}"):
        from flopprof.models import load
        from flopprof.report.csv import to_csv

        workload = load(
            target,
            batch=batch,
            image_size=image_size,
            inputs=inputs or (),
            device=device,
            dtype=dtype,
            train=train,
            model_args=arguments,
            seq=seq,
            audio_seconds=audio_seconds,
            images=images,
            trust_remote_code=trust_remote_code,
        )
        profile = workload.count(backward=backward, attention=attention, lines=by == "line", fold=fold)
    if strict and profile.uncounted:
        raise UncountedOperators(
            f"{target} runs operators that have no formula: {', '.join(profile.uncounted)}. "
            "Give each one with flopprof.register_formula, or leave --strict out."
        )
    mismatch = workload.stored().get("mismatch")
    if mismatch is not None and "-" in (json, csv):
        typer.echo(f"flopprof: {mismatch}", err=True)
    if json is not None:
        write_text(json, profile.to_json())
    if csv is not None:
        write_text(csv, to_csv(profile))
    if "-" not in (json, csv):
        from flopprof.report.console import render

        heading = f"{workload.describe()}, {profile.device}"
        sources = _sources(profile) if by == "line" else None
        report = render(
            profile, heading=heading, depth=depth, by=by, unit=unit, sources=sources, stored=workload.stored()
        )
        console().print(report, crop=False)


def _sources(profile: Profile) -> dict[str, str]:
    """The text of every source line that the profile names."""
    from flopprof.counting.lines import source_text

    return {line: source_text(line) for line in profile.by_line()}


def parse_model_arg(text: str) -> tuple[str, object]:
    """(name, value) of `num_classes=10`: a Python literal where it is one, else the text. Raises UsageError."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise UsageError(f"cannot read --model-arg {text!r}: write it as name=value, as in num_classes=10.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
