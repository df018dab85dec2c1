"""`flopprof crosscheck`: one model, several counters, every difference explained."""

from __future__ import annotations

from typing import Annotated

import typer

from flopprof.cli.count import parse_model_arg
from flopprof.cli.options import (
    AudioSeconds,
    Backward,
    Batch,
    Device,
    Dtype,
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
from flopprof.errors import EnginesDisagree

_REPORT = "What is printed"
_NAMED = 5


def crosscheck(
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
    device: Device = None,
    dtype: Dtype = None,
    model_args: ModelArgs = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write everything as JSON, in FLOPs; - is standard output, instead of the tables.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Compare flopprof's engines, FlopCounterMode, fvcore and torchvision's published figures on one model.

    Every difference is told by operator. Exits with 1 where flopprof's own engines disagree.
    """
    ctx.meta["flopprof.traceback"] = traceback
    arguments = dict(parse_model_arg(text) for text in model_args or ())
    require_writable(json)
    with progress(f"Cross-checking {target}"):
        from flopprof.crosscheck.check import crosscheck as check
        from flopprof.models import load

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
        result = check(workload, backward=backward)
    if json is not None:
        write_text(json, result.to_json())
    if json != "-":
        from flopprof.report.crosscheck import render

        console().print(render(result), crop=False)
    if not result.agree:
        modules = list(dict.fromkeys(found.module or "(root)" for found in result.disagreements))
        more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
        raise EnginesDisagree(
            f"flopprof's own engines disagree on {target} in {', '.join(modules[:_NAMED])}{more}: please report it."
        )
