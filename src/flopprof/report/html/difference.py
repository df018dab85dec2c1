"""Difference -> a page: what changed between two profiles, as bars and as tables with every figure exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flopprof.compare.difference import Change, Difference
from flopprof.report.html.elements import Head, exact, figure, paragraph, table
from flopprof.report.html.page import Section, page, plot_text

_BARS, _ROWS = 25, 300
_UNITS = {"bytes_moved": "bytes", "n_params": "parameters", "n_params_trainable": "parameters"}
_COLOURS = ("#3f9d6c", "#d9772b")  # less, more


def render(difference: Difference) -> str:
    """The page of a difference. Raises MissingPackage without plotly."""
    heading = f"{difference.before or '(unnamed)'} to {difference.after or '(unnamed)'}"
    phase = f", {difference.phase} only" if difference.phase else ""
    lead = (
        "No figure differs." if difference.same else f"A delta is after - before{phase}. One multiply-add is 2 FLOPs."
    )
    return page(heading, lead, [_totals(difference), *_parts(difference)])


def _totals(difference: Difference) -> Section:
    rows = [
        [change.name.replace("_", " "), *_cells(change), _UNITS.get(change.name, "FLOPs")]
        for change in (*difference.phases, *difference.totals)
        if change.before or change.after
    ]
    heads = [Head("Total"), *_HEADS, Head("Unit", number=False)]
    return Section(anchor="totals", title="Totals", body=table(heads, rows, caption="Totals before and after"))


_HEADS = (Head("Before"), Head("After"), Head("Delta"), Head("Change"))


def _parts(difference: Difference) -> Iterator[Section]:
    for anchor, title, changes, unit in (
        ("modules", "Modules, without what is below them", difference.own, "FLOPs"),
        ("operators", "Operators", difference.operators, "FLOPs"),
        ("parameters", "Parameters, with what is below", difference.parameters, "parameters"),
        ("uncounted", "Operators without a formula", difference.uncounted, "calls"),
    ):
        if changes:
            chart = _bars([change for change in changes[:_BARS] if change.delta] or changes[:1], unit)
            name = f"{anchor}-chart"
            rows = [[change.name or "(root)", *_cells(change)] for change in changes[:_ROWS]]
            body = figure(name, label=f"The largest deltas of {title.lower()}", height=chart["height"])
            body += table([Head("Name"), *_HEADS], rows, caption=f"{title}: {unit} before and after")
            if len(changes) > _ROWS:
                body += paragraph(f"{len(changes) - _ROWS:,} more with smaller deltas: flopprof diff --json has them.")
            figures = {name: {"data": chart["data"], "layout": chart["layout"]}}
            yield Section(anchor=anchor, title=title, body=body, figures=figures)


def _bars(changes: Sequence[Change], unit: str) -> dict[str, Any]:
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": [plot_text(change.name or "(root)") for change in changes],
        "x": [float(change.delta) for change in changes],
        "text": [f"{change.kind}: {_signed(change.delta)} {unit}" for change in changes],
        "textposition": "none",
        "hovertemplate": "%{y}<br>%{text}<extra></extra>",
        "marker": {"color": [_COLOURS[change.delta > 0] for change in changes]},
    }
    layout = {
        "xaxis": {"title": {"text": f"{unit}, after - before"}, "tickformat": "~s", "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    return {"data": [bar], "layout": layout, "height": 90 + 24 * len(changes)}


def _cells(change: Change) -> list[str]:
    words = {"added": "added", "removed": "removed"}
    share = f"{100 * change.delta / change.before:+.1f}%" if change.before else ""
    return [
        "absent" if change.before is None else exact(change.before),
        "absent" if change.after is None else exact(change.after),
        _signed(change.delta),
        words.get(change.kind, share),
    ]


def _signed(delta: int) -> str:
    return f"{'+' if delta > 0 else ''}{delta:,}"
