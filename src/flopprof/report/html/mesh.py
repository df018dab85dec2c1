"""Mesh -> a page: what a rank of each pipeline stage does, holds and sends, as charts and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flopprof.plan.mesh_result import Mesh
from flopprof.report.html.elements import Head, exact, facts, figure, table
from flopprof.report.html.page import Section, page
from flopprof.report.mesh import SENT, WORK, Figure, shown, stages, title
from flopprof.report.mesh import facts as told

_COLOURS = ("#3b82c4", "#d9772b", "#3f9d6c", "#b5588f", "#c9a227", "#8a929c")


def render(mesh: Mesh) -> str:
    """The page of a simulated mesh. Raises MissingPackage without plotly."""
    memory = [Figure("states", lambda stage: stage.states_bytes, str)]
    memory.append(Figure("activations", lambda stage: stage.activations_bytes, str))
    flops = [
        Figure("forward", lambda stage: stage.forward_flops, str),
        Figure("backward", lambda stage: stage.backward_flops, str),
    ]
    parts = [
        Section(anchor="step", title="A step", body=facts(told(mesh))),
        _section(mesh, "work", "FLOPs of a rank", flops, "FLOPs", WORK[:2]),
        _section(mesh, "memory", "Memory of a rank", shown(mesh, memory), "bytes", WORK[2:]),
        _section(mesh, "sent", "Sent by a rank", shown(mesh, SENT[:-1]), "bytes", SENT),
    ]
    return page(title(mesh), "A step of training, simulated on the meta device", parts)


def _section(
    mesh: Mesh, anchor: str, heading: str, drawn: Sequence[Figure], unit: str, listed: Sequence[Figure]
) -> Section:
    columns = shown(mesh, listed)
    heads = [Head("Stage"), Head("Blocks", number=False), *(Head(_plain(each.head), unit) for each in columns)]
    if anchor == "work":
        heads[-1] = Head("Parameters")
    rows = [[number, blocks, *(exact(each.value(stage)) for each in columns)] for number, blocks, stage in stages(mesh)]
    name = f"{anchor}-chart"
    body = figure(name, label=f"{heading} by stage, as in the table", height=130 + 26 * len(mesh.stages))
    body += table(heads, rows, caption=f"{heading}, by stage")
    return Section(anchor=anchor, title=heading, body=body, figures={name: _bars(mesh, drawn, unit)})


def _bars(mesh: Mesh, drawn: Sequence[Figure], unit: str) -> dict[str, Any]:
    names = [f"stage {number}" for number in range(len(mesh.stages))]
    traces = []
    for each, colour in zip(drawn, _COLOURS, strict=False):
        values = [each.value(stage) or 0 for stage in mesh.stages]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": _plain(each.head),
                "y": names,
                "x": [float(value) for value in values],
                "text": [f"{value:,} {unit}" for value in values],
                "textposition": "none",
                "hovertemplate": f"%{{y}}, {_plain(each.head)}<br>%{{text}}<extra></extra>",
                "marker": {"color": colour},
            }
        )
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": unit}, "tickformat": "~s", "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "showlegend": True,
    }
    return {"data": traces, "layout": layout}


def _plain(head: str) -> str:
    return head.replace("-\n", "").replace("\n", " ").strip()
