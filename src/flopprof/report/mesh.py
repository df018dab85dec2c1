"""A simulated mesh as a table: what a rank of each pipeline stage does, holds and sends."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.plan.mesh_result import Mesh, Stage
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import format_si


def render(mesh: Mesh) -> RenderableType:
    """A line a stage (alike ones together), and whether the ranks' work sums to the whole."""
    known = all(stage.activations_bytes is not None for stage in mesh.stages)
    columns = [
        Column("Stage\n ", number=False),
        Column("Blocks\n ", number=False),
        Column("FLOPs\na rank"),
        Column("Params\na rank"),
        Column("States\n "),
        *([Column("Activ-\nations")] if known else []),
        Column("TP\nsent"),
        Column("PP\nsent"),
        Column("DP\nsent"),
    ]
    rows = []
    start = 0
    for end in range(1, len(mesh.stages) + 1):
        if end < len(mesh.stages) and _alike(mesh.stages[start], mesh.stages[end]):
            continue
        stage = mesh.stages[start]
        rows.append(
            [
                str(start) if end - start == 1 else f"{start}..{end - 1}",
                f"{stage.first}..{mesh.stages[end - 1].last}",
                format_si(stage.flops, digits=4),
                format_si(stage.params, digits=4),
                _bytes(stage.states_bytes),
                *([_bytes(stage.activations_bytes or 0)] if known else []),
                _bytes(stage.traffic.tensor),
                _bytes(stage.traffic.pipeline),
                _bytes(stage.traffic.data),
            ]
        )
        start = end
    title = f"{mesh.model}: tp {mesh.tp} x pp {mesh.pp} x dp {mesh.dp} = {mesh.ranks:,} ranks"
    return Group(Text(title, style="bold"), Text(), Grid(columns, rows), Text(), Facts(_facts(mesh)))


def _facts(mesh: Mesh) -> list[tuple[str, str]]:
    tokens = "" if mesh.seq is None else f" of {mesh.seq} tokens"
    sequences = mesh.dp * mesh.micro_batches * mesh.micro_batch
    equal = mesh.ranks_flops == mesh.whole_flops
    extra = mesh.ranks_flops - mesh.whole_flops
    verdict = "as unsharded" if equal else f"{extra:.4g} more than unsharded, done on {mesh.tp} ranks alike"
    micro = f"{mesh.micro_batches} micro-batches of {mesh.micro_batch}"
    facts = [
        ("stage", f"{mesh.tp * mesh.dp:,} ranks each, all alike"),
        ("a step", f"{sequences:,} sequences{tokens}: {micro} a replica"),
        ("all ranks", f"{mesh.ranks_flops:.6g} FLOPs, {verdict}"),
    ]
    if not equal:
        facts.append(("", f"not split: {', '.join(mesh.replicated)}"))
    if mesh.pp > 1:
        bubble = f"{mesh.bubble:.1%} of a step in the bubble of 1F1B"
        facts.append(("pipeline", f"{bubble}; the mean stage has {mesh.balance:.1%} of the longest one's FLOPs"))
    facts.append(("sent", "bytes a step of each rank: around rings (TP, DP), to the stages beside it (PP)"))
    facts.append(("states", f"weights, gradients, optimizer, ZeRO {mesh.zero}; activations and logits of the forward"))
    return facts


def _alike(a: Stage, b: Stage) -> bool:
    same = ("forward_flops", "backward_flops", "recompute_flops", "params", "activations_bytes", "traffic")
    return all(getattr(a, name) == getattr(b, name) for name in same)


def _bytes(count: int) -> str:
    return "-" if count == 0 else format_si(count, "B", digits=3)
