"""`flopprof plan`: time, money, energy and memory of a training run or a service."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flopprof.cli.options import Traceback
from flopprof.cli.output import STDOUT, file_of, progress, require_outputs, show, write_text
from flopprof.errors import UsageError
from flopprof.units import parse_count, parse_share

if TYPE_CHECKING:
    from flopprof.plan.memory import Layout

_MODEL, _RUN, _HARDWARE = "The model", "The run", "The hardware"
_MEMORY, _SERVING, _REPORT = "Training memory", "Decoding", "What is printed"
_BARE = {"tied", "gated"}

# What makes a difference with --published, and with --mesh; --tp and --pp have a sentence of their own there.
_OF_PUBLISHED = {"published", "json", "html", "traceback"}
_OF_LAYOUT = {"micro_batch", "checkpointing", "zero", "tp", "sequence_parallel", "pp", "precision", "optimizer"}
_OF_LAYOUT |= {"keep_scores", "dropout"}
_OF_MESH = {"model", "seq", "mesh", "micro_batches", "json", "html", "traceback"} | _OF_LAYOUT


def plan(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A text model that `flopprof models` lists (llama-3.1-8b), or the directory of a checkpoint; else "
            "--params or --shape.",
            metavar="[MODEL]",
            show_default=False,
        ),
    ] = None,
    *,
    params: Annotated[
        str | None, typer.Option(help="Parameters: 7e9, 70B.", metavar="N", rich_help_panel=_MODEL)
    ] = None,
    active_params: Annotated[
        str | None,
        typer.Option(help="Of these, the ones that a token visits (experts).", metavar="N", rich_help_panel=_MODEL),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Sizes, separated by commas: layers=32, d_model=4096, heads=32, vocab=32000; also kv_heads=8, "
            "d_ff=11008, gated=true and more.",
            metavar="SIZES",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    seq: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a text; default: 4096, with --mesh 512, or as far as the model reaches.",
            metavar="N",
            min=1,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens trained on: 1e12, 1.4T.", metavar="D", rich_help_panel=_RUN)
    ] = None,
    flops: Annotated[
        str | None, typer.Option(help="FLOPs of the whole training: 3.8e25.", metavar="C", rich_help_panel=_RUN)
    ] = None,
    count_by: Annotated[
        Literal["6nd", "detailed"] | None,
        typer.Option(
            help="FLOPs as 6 x active parameters x tokens, or as three forwards with attention over all pairs; "
            "default: detailed where the shape is known.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="A device that `flopprof peaks` lists: H100.", metavar="DEVICE", rich_help_panel=_HARDWARE),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the products; default: bf16, else fp16.", metavar="DTYPE", rich_help_panel=_HARDWARE),
    ] = None,
    peak: Annotated[
        str | None,
        typer.Option(help="FLOP/s of a device, instead of the table's.", metavar="FLOP/S", rich_help_panel=_HARDWARE),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(help="Bytes/s of its memory, instead of the table's.", metavar="B/S", rich_help_panel=_HARDWARE),
    ] = None,
    mfu: Annotated[
        str | None,
        typer.Option(help="Model FLOPs utilisation: 0.4 or 40%; default: 1.", metavar="SHARE", rich_help_panel=_RUN),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Accelerators that train together.", metavar="N", min=1, rich_help_panel=_RUN)
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="Days that the training takes.", metavar="DAYS", rich_help_panel=_RUN)
    ] = None,
    device_hours: Annotated[
        str | None, typer.Option(help="Of all devices together.", metavar="HOURS", rich_help_panel=_RUN)
    ] = None,
    price: Annotated[float | None, typer.Option(help="USD a device-hour.", metavar="USD", rich_help_panel=_RUN)] = None,
    cost: Annotated[str | None, typer.Option(help="USD in all: 1e6, 2M.", metavar="USD", rich_help_panel=_RUN)] = None,
    power: Annotated[
        float | None,
        typer.Option(help="W a device, as measured; default: its TDP.", metavar="WATTS", rich_help_panel=_RUN),
    ] = None,
    pue: Annotated[
        float, typer.Option(help="Power of the building over that of its devices.", rich_help_panel=_RUN)
    ] = 1.0,
    co2: Annotated[float | None, typer.Option(help="kg of CO2 a kWh.", metavar="KG", rich_help_panel=_RUN)] = None,
    micro_batch: Annotated[
        int, typer.Option(help="Sequences at a time on a device.", metavar="N", min=1, rich_help_panel=_MEMORY)
    ] = 1,
    checkpointing: Annotated[
        Literal["none", "selective", "full"], typer.Option(help="Of activations.", rich_help_panel=_MEMORY)
    ] = "none",
    zero: Annotated[
        int,
        typer.Option(
            help="What data parallel ranks share out: 1 optimizer, 2 gradients too, 3 weights too (FSDP).",
            min=0,
            max=3,
            rich_help_panel=_MEMORY,
        ),
    ] = 0,
    tp: Annotated[int, typer.Option(help="Tensor parallel ranks.", metavar="N", min=1, rich_help_panel=_MEMORY)] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Split norms over them too.", rich_help_panel=_MEMORY)
    ] = False,
    pp: Annotated[int, typer.Option(help="Pipeline stages.", metavar="N", min=1, rich_help_panel=_MEMORY)] = 1,
    precision: Annotated[
        Literal["mixed", "fp32", "bf16"],
        typer.Option(
            help="Of weights and optimizer; mixed: 16 bit, with 32-bit copies in the optimizer.",
            rich_help_panel=_MEMORY,
        ),
    ] = "mixed",
    optimizer: Annotated[
        Literal["adamw", "momentum", "sgd"],
        typer.Option(help="Whose states are kept: two, one or none a parameter.", rich_help_panel=_MEMORY),
    ] = "adamw",
    keep_scores: Annotated[
        bool,
        typer.Option("--keep-scores", help="Attention keeps its scores: no fused kernel.", rich_help_panel=_MEMORY),
    ] = False,
    dropout: Annotated[
        bool, typer.Option("--dropout", help="Dropout's masks are kept too.", rich_help_panel=_MEMORY)
    ] = False,
    batch: Annotated[
        int, typer.Option(help="Sequences decoded together.", metavar="N", min=1, rich_help_panel=_SERVING)
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens before the decoded one; default: --seq.", metavar="N", min=0, rich_help_panel=_SERVING
        ),
    ] = None,
    weight_bits: Annotated[int, typer.Option(help="16, 8, 4.", metavar="BITS", min=1, rich_help_panel=_SERVING)] = 16,
    serving_devices: Annotated[
        int, typer.Option(help="Devices that share a step evenly.", metavar="N", min=1, rich_help_panel=_SERVING)
    ] = 1,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Simulate a training step of MODEL (any that `flopprof count` takes) on a mesh of devices: "
            "tp=8,sp,pp=4,dp=16 (also cp=, ep=, etp=). FLOPs, memory and bytes sent of each rank.",
            metavar="AXES",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            help="With --mesh: of each replica in a step; default: pp.", metavar="N", min=1, rich_help_panel=_MEMORY
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show published runs and their utilisation.", rich_help_panel=_REPORT)
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the plan as JSON; - is standard output, instead of the page.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            help="Write one page of charts, which works offline; - is standard output.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Plan training or serving: from some of model, tokens, FLOPs, devices, days, money and MFU, the rest."""
    ctx.meta["flopprof.traceback"] = traceback
    require_outputs(None if model is None else file_of(model), json=json, html=html)
    if published:
        _require_effect(ctx, _OF_PUBLISHED, "--published")
        _published(json, html)
        return
    if mesh is not None:
        _require_effect(ctx, _OF_MESH, "--mesh")
    elif micro_batches is not None:
        raise UsageError("--micro-batches are those of --mesh: give it too, or leave them out.")
    from flopprof.plan.make import plan as make
    from flopprof.plan.memory import Layout
    from flopprof.plan.serving import Service

    layout = Layout(
        precision=precision,
        optimizer=optimizer,
        checkpointing=checkpointing,
        zero=zero,
        tp=tp,
        pp=pp,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        fused_attention=not keep_scores,
        dropout=dropout,
    )
    if mesh is not None:
        _mesh(model, mesh, seq, layout, micro_batches, json, html)
        return
    found = make(
        model,
        params=_count(params),
        active_params=_count(active_params),
        shape=None if shape is None else _shape(shape),
        seq=seq,
        tokens=_count(tokens),
        flops=_count(flops),
        count_by=count_by,
        hardware=hardware,
        dtype=dtype,
        peak=_count(peak),
        bandwidth=_count(bandwidth),
        mfu=None if mfu is None else float(parse_share(mfu)),
        devices=devices,
        days=days,
        device_hours=_count(device_hours),
        price=price,
        cost=_count(cost),
        power_w=power,
        pue=pue,
        co2_kg_per_kwh=co2,
        layout=layout,
        service=Service(batch=batch, context=context, weight_bits=weight_bits, devices=serving_devices),
    )
    if json is not None:
        write_text(json, found.to_json())
    if html is not None:
        from flopprof.report.html.plan import render as page

        write_text(html, page(found))
    if STDOUT not in (json, html):
        from flopprof.report.plan import render

        show(render(found))


def _require_effect(ctx: typer.Context, known: Collection[str], of: str) -> None:
    """Raises UsageError for what is given and makes no difference."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(str(parameter.name))
        if parameter.name not in known and source is not None and source.name == "COMMANDLINE":
            option = parameter.opts[0] if parameter.param_type_name == "option" else "MODEL"
            raise UsageError(f"{option} has no effect on {of}: leave one of them out.")


def _mesh(
    model: str | None,
    text: str,
    seq: int | None,
    layout: Layout,
    micro_batches: int | None,
    json: str | None,
    html: str | None,
) -> None:
    """Counts the model on meta, sharded; the only part of a plan that imports torch."""
    from dataclasses import replace

    from flopprof.plan.mesh_axes import parse_mesh

    if model is None:
        raise UsageError("--mesh needs a MODEL by name: its own shards are counted.")
    if layout.tp > 1 or layout.pp > 1:
        raise UsageError("--tp and --pp are for plans without --mesh: write them into it, as in --mesh tp=8,pp=4.")
    axes = parse_mesh(text)
    axes = replace(axes, sp=axes.sp or layout.sequence_parallel)
    with progress(f"Simulating {model}"):
        from flopprof.models import load
        from flopprof.plan.mesh import simulate
        from flopprof.plan.sizes import shape_of_config

        workload = load(model, batch=layout.micro_batch, seq=seq)
        shape = None
        if workload.tokens:
            shape = shape_of_config(getattr(workload.model, "config", None), workload.tokens // layout.micro_batch)
        found = simulate(workload, axes, micro_batches=micro_batches, layout=layout, shape=shape)
    if json is not None:
        write_text(json, found.to_json())
    if html is not None:
        from flopprof.report.html.mesh import render as page

        write_text(html, page(found))
    if STDOUT not in (json, html):
        from flopprof.report.mesh import render

        show(render(found))


def _published(json: str | None, html: str | None) -> None:
    from flopprof.plan.published import runs

    if json is not None:
        import msgspec

        write_text(json, msgspec.json.format(msgspec.json.encode({"runs": runs()}), indent=1).decode())
    if html is not None:
        from flopprof.report.html.plan import render_runs as page

        write_text(html, page(runs()))
    if STDOUT not in (json, html):
        from flopprof.report.plan import render_runs

        show(render_runs(runs()))


def _count(text: str | None) -> int | None:
    return None if text is None else parse_count(text)


def _shape(text: str) -> dict[str, Any]:  # sizes are ints, two are booleans
    """`layers=32,d_model=4096,gated` as fields of TransformerShape. Raises UsageError."""
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals and name in _BARE:
            sizes[name] = True
        elif equals and value.lower() in ("true", "false"):
            sizes[name] = value.lower() == "true"
        elif equals:
            sizes[name] = parse_count(value)
        else:
            raise UsageError(f"cannot read {part!r} of --shape: write it as layers=32.")
    return sizes
