"""`flopprof reconcile`: why a model's FLOPs are not 2 N T or 6 N T."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flopprof.cli.count import parse_model_arg
from flopprof.cli.options import (
    RUN,
    AttentionPairs,
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
from flopprof.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

_REPORT = "What is printed"


def reconcile(
    ctx: typer.Context,
    target: Target,
    *,
    batch: Batch = 1,
    seq: Seq = None,
    image_size: ImageSize = None,
    audio_seconds: AudioSeconds = None,
    images: Images = 1,
    inputs: Inputs = None,
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
    train: Train = False,
    frozen: Annotated[
        list[str] | None,
        typer.Option(
            help="Parameters or modules that do not train: 'embed*', 'layers.0'. Repeat per pattern.",
            metavar="GLOB",
            rich_help_panel=RUN,
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Low-rank adapters on linear layers, all else frozen: 16:'*.q_proj'.",
            metavar="RANK:GLOB",
            rich_help_panel=RUN,
        ),
    ] = None,
    checkpointing: Annotated[
        Literal["non-reentrant", "reentrant"] | None,
        typer.Option(help="Run repeated blocks again in the backward.", rich_help_panel=RUN),
    ] = None,
    attention: AttentionPairs = "full",
    device: Device = None,
    dtype: Dtype = None,
    model_args: ModelArgs = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the ledger as JSON, in FLOPs; - is standard output, instead of the table.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Tell why a model's FLOPs differ from 2 N T (forward) and 6 N T (training), to the last FLOP."""
    ctx.meta["flopprof.traceback"] = traceback
    arguments = dict(parse_model_arg(text) for text in model_args or ())
    adapters = parse_lora(lora) if lora is not None else None
    require_writable(json)
    with progress(f"Reconciling {target}"):
        from flopprof.models import load
        from flopprof.models.variants import add_lora, checkpoint_blocks, freeze, varied

        def vary(model: nn.Module) -> None:
            if adapters is not None:
                add_lora(model, *adapters)
            for pattern in frozen or ():
                freeze(model, pattern)
            if checkpointing is not None:
                checkpoint_blocks(model, checkpointing)

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
        profile = varied(workload, vary).count(backward=backward or checkpointing is not None, attention=attention)
        ledger = profile.reconcile(tokens)
    if json is not None:
        write_text(json, ledger.to_json())
    if json != "-":
        from flopprof.report.ledger import render

        console().print(render(ledger, heading=f"{target}, {workload.describe()}"), crop=False)


def parse_lora(text: str) -> tuple[int, str]:
    """(rank, pattern) of `16:*.q_proj`. Raises UsageError."""
    rank, sign, pattern = text.partition(":")
    if not sign or not rank.isdecimal() or not pattern:
        raise UsageError(f"cannot read --lora {text!r}: write it as RANK:GLOB, as in 16:'*.q_proj'.")
    return int(rank), pattern
