"""A simulated mesh as a table: what a rank of each pipeline stage does, holds and sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.plan.mesh_result import Mesh, Stage
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import format_si


def render(mesh: Mesh) -> RenderableType:
    """A line a stage (alike ones together), what is sent, and whether the ranks' work sums to the whole."""
    return Group(
        Text(title(mesh), style="bold"),
        Text(),
        Grid(*_columns(mesh, WORK)),
        Text(),
        Grid(*_columns(mesh, SENT)),
        Text(),
        Facts(facts(mesh)),
    )


def title(mesh: Mesh) -> str:
    """`mixtral-8x7b: tp 2 (sp) x cp 2 x pp 4 x dp 8 = 128 ranks`: cp where there are several."""
    context = f"cp {mesh.cp}" if mesh.cp > 1 else ""
    axes = filter(None, [f"tp {mesh.tp}{' (sp)' if mesh.sp else ''}", context, f"pp {mesh.pp}", f"dp {mesh.dp}"])
    return f"{mesh.model}: {' x '.join(axes)} = {mesh.ranks:,} ranks"


@dataclass(frozen=True)
class Figure:
    """One column: its head, what a stage has there as an exact integer, and how it is written."""

    head: str
    value: Callable[[Stage], int | None]
    text: Callable[[int], str]


def _bytes(count: int) -> str:
    return "-" if count == 0 else format_si(count, "B", digits=3)


def _number(count: int) -> str:
    return format_si(count, digits=4)


WORK = (
    Figure("FLOPs\na rank", lambda stage: stage.flops, _number),
    Figure("Params\na rank", lambda stage: stage.params, _number),
    Figure("States\n ", lambda stage: stage.states_bytes, _bytes),
    Figure("Activ-\nations", lambda stage: stage.activations_bytes, _bytes),
    Figure("Memory\n ", lambda stage: stage.memory_bytes if stage.activations_bytes is not None else None, _bytes),
)
SENT = (
    Figure("TP\nsent", lambda stage: stage.traffic.tensor, _bytes),
    Figure("TP\nagain", lambda stage: stage.traffic.gathered_again, _bytes),
    Figure("CP\nsent", lambda stage: stage.traffic.context, _bytes),
    Figure("EP\nsent", lambda stage: stage.traffic.expert, _bytes),
    Figure("PP\nsent", lambda stage: stage.traffic.pipeline, _bytes),
    Figure("DP\nsent", lambda stage: stage.traffic.data, _bytes),
    Figure("All\nsent", lambda stage: stage.traffic.total, _bytes),
)
_ALWAYS = {"TP\nsent", "PP\nsent", "DP\nsent", "All\nsent"}


def shown(mesh: Mesh, figures: Sequence[Figure]) -> list[Figure]:
    """Those that are known, and of what is sent those that some stage sends."""
    values = {figure.head: [figure.value(stage) for stage in mesh.stages] for figure in figures}
    return [
        figure
        for figure in figures
        if None not in values[figure.head]
        and (figure not in SENT or figure.head in _ALWAYS or any(values[figure.head]))
    ]


def stages(mesh: Mesh) -> Iterator[tuple[str, str, Stage]]:
    """(stages, blocks, one of them) of each row of like stages that follow each other."""
    start = 0
    for end in range(1, len(mesh.stages) + 1):
        if end < len(mesh.stages) and _alike(mesh.stages[start], mesh.stages[end]):
            continue
        stage = mesh.stages[start]
        number = str(start) if end - start == 1 else f"{start}..{end - 1}"
        yield number, f"{stage.first}..{mesh.stages[end - 1].last}", stage
        start = end


def _columns(mesh: Mesh, figures: Sequence[Figure]) -> tuple[list[Column], list[list[str]]]:
    figures = shown(mesh, figures)
    columns = [Column("Stage\n ", number=False), Column("Blocks\n ", number=False)]
    columns += [Column(figure.head) for figure in figures]
    rows = [
        [number, blocks, *(figure.text(figure.value(stage) or 0) for figure in figures)]
        for number, blocks, stage in stages(mesh)
    ]
    return columns, rows


def facts(mesh: Mesh) -> list[tuple[str, str]]:
    """Labelled sentences: what a step is, whether the ranks sum to the whole, and what the columns are."""
    tokens = "" if mesh.seq is None else f" of {mesh.seq} tokens"
    sequences = mesh.dp * mesh.micro_batches * mesh.micro_batch
    micro = f"{_many(mesh.micro_batches, 'micro-batch', 'es')} of {mesh.micro_batch}"
    found = [
        ("stage", f"{mesh.ranks // mesh.pp:,} ranks each, all alike"),
        ("a step", f"{_many(sequences, 'sequence')}{tokens}: {micro} a replica"),
    ]
    if mesh.replicated:
        found.append(
            (
                "all ranks",
                f"{mesh.ranks_flops:.6g} FLOPs = {mesh.whole_flops:.6g} unsharded + {mesh.replicated_flops:.6g} done "
                f"over again, {mesh.tp} tensor parallel ranks alike",
            )
        )
        named = sorted(mesh.replicated, key=lambda row: -row.flops)
        found += [("" if i else "not split", f"{row.module}: {row.flops:.4g} FLOPs") for i, row in enumerate(named)]
    else:
        found.append(("all ranks", f"{mesh.ranks_flops:.6g} FLOPs, as unsharded"))
    if mesh.ep > 1:
        sliced = f", each over {mesh.etp} tensor parallel ranks" if mesh.etp > 1 else ", each whole"
        copies = mesh.tp * mesh.cp * mesh.dp // (mesh.ep * mesh.etp)
        found.append(
            ("experts", f"over {mesh.ep} ranks{sliced}" + (f"; {copies} ranks hold the same" if copies > 1 else ""))
        )
    if mesh.pp > 1:
        bubble = f"{mesh.bubble:.1%} of a step in the bubble of 1F1B"
        found.append(("pipeline", f"{bubble}; the mean stage has {mesh.balance:.1%} of the longest one's FLOPs"))
    found.append(("sent", "bytes a step of each rank: around rings (TP, CP, EP, DP), to the stages beside it (PP)"))
    if mesh.tp > 1:
        most = max(mesh.stages, key=lambda stage: stage.traffic.tensor_each).traffic
        way = "reduce-scatters and all-gathers" if mesh.sp else "all-reduces"
        one = f"TP: {way}, one for products of the same input"
        if most.tensor_each != most.tensor:
            one += f"; with one each, as torch's own, {_bytes(most.tensor_each)} instead of {_bytes(most.tensor)}"
        found.append(("", one))
    if mesh.sp:
        found.append(("", "TP again: inputs of which a rank keeps a slice, gathered a second time in backward"))
    found.append(("states", f"weights, gradients, optimizer, ZeRO {mesh.zero}; activations and logits of the forward"))
    found += [("assumed", text) for text in mesh.assumptions]
    return found


def _many(count: int, word: str, ending: str = "s") -> str:
    return f"{count:,} {word}{'' if count == 1 else ending}"


def _alike(a: Stage, b: Stage) -> bool:
    same = ("forward_flops", "backward_flops", "recompute_flops", "params", "activations_bytes", "traffic")
    return all(getattr(a, name) == getattr(b, name) for name in same)
