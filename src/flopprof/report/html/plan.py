"""Plan -> a page: the run, its memory on one device, its time on more or fewer of them, and decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flopprof.plan.result import Plan, Run
from flopprof.report.html.elements import Head, facts, figure, table
from flopprof.report.html.page import Section, page, plot_text
from flopprof.report.plan import notes, sections
from flopprof.units import format_si

_COLOURS = ("#3b82c4", "#d9772b", "#3f9d6c", "#b5588f", "#c9a227")


def render(plan: Plan) -> str:
    """The page of a plan. Raises MissingPackage without plotly."""
    given = f"From {', '.join(name.replace('_', ' ') for name in plan.given)}" if plan.given else ""
    parts = [_section(number, title, lines, plan) for number, (title, lines) in enumerate(sections(plan))]
    told = notes(plan)
    if told:
        parts.append(Section(anchor="notes", title="Assumptions", body=facts(told)))
    return page(f"Plan for {plan.model}" if plan.model else "Plan", given, parts)


def render_runs(runs: Sequence[Run]) -> str:
    """The page of published runs and what their figures imply. Raises MissingPackage without plotly."""
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": [plot_text(run.name) for run in runs],
        "x": [run.utilisation for run in runs],
        "text": [f"{run.flops_per_s:.4g} FLOP/s a device, {plot_text(run.device)} {run.dtype}" for run in runs],
        "textposition": "none",
        "hovertemplate": "%{y}: %{x:.1%}<br>%{text}<extra></extra>",
        "marker": {"color": _COLOURS[0]},
    }
    layout = {
        "xaxis": {"title": {"text": "share of the dense peak"}, "tickformat": ".0%", "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    heads = [
        *(Head("Run"), Head("N"), Head("Tokens"), Head("6 N D", "FLOPs"), Head("Device", number=False)),
        *(Head("Device-hours"), Head("Reached", "FLOP/s"), Head("Share", "of peak"), Head("Source", number=False)),
        Head("As of", number=False),
    ]
    rows = [
        [
            run.name,
            format_si(run.params),
            format_si(run.tokens),
            f"{run.flops:.4g}",
            f"{run.device}, {run.dtype}",
            "" if run.device_hours is None else f"{run.device_hours:,.0f}",
            format_si(run.flops_per_s),
            f"{run.utilisation:.1%}",
            run.source,
            run.date.isoformat(),
        ]
        for run in runs
    ]
    body = figure("runs", label="Share of the dense peak by run, as in the table", height=80 + 28 * len(runs))
    body += table(heads, rows, caption="Published runs: 6 N D over device-hours and dense peak")
    section = Section(
        anchor="published",
        title="Reached",
        body=body,
        figures={"runs": {"data": [bar], "layout": layout}},
    )
    lead = "6 N D over device-hours and dense peak: shares of whole runs, restarts and evaluation included"
    return page("Published runs", lead, [section])


def _section(number: int, title: str, lines: list[tuple[str, str]], plan: Plan) -> Section:
    charts = dict(_charts(title, plan))
    body = facts(lines) + "".join(
        figure(name, label=chart["label"], height=chart["height"]) for name, chart in charts.items()
    )
    figures = {name: {"data": chart["data"], "layout": chart["layout"]} for name, chart in charts.items()}
    return Section(anchor=f"part-{number}", title=title, body=body, figures=figures)


def _charts(title: str, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    if title == "Training" and plan.device_hours and plan.devices:
        yield "time", _time(plan, plan.device_hours, plan.devices)
    if title.startswith("Training memory") and plan.memory is not None:
        yield "memory", _memory(plan)
    serving = plan.serving
    if title == "Decoding" and serving is not None and serving.compute_s is not None and serving.memory_s is not None:
        yield "step", _step(serving.compute_s, serving.memory_s)


def _time(plan: Plan, device_hours: float, devices: float) -> dict[str, Any]:
    """Days against devices, at the same utilisation."""
    numbers = [devices * 2 ** (i / 4) for i in range(-16, 17) if devices * 2 ** (i / 4) >= 1]
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": numbers,
        "y": [device_hours / 24 / number for number in numbers],
        "line": {"color": _COLOURS[0]},
        "hovertemplate": "%{x:.4~s} devices: %{y:.4~r} days<extra></extra>",
    }
    point = {
        "type": "scatter",
        "mode": "markers",
        "x": [devices],
        "y": [device_hours / 24 / devices],
        "marker": {"size": 12, "color": _COLOURS[1]},
        "hovertemplate": "this plan: %{x:.4~s} devices, %{y:.4~r} days<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "devices"}, "type": "log", "dtick": "D2", "tickformat": "~s", "automargin": True},
        "yaxis": {"title": {"text": "days"}, "type": "log", "dtick": "D2", "tickformat": "~g", "automargin": True},
        "showlegend": False,
    }
    label = "Days against devices, at the same utilisation"
    return {"data": [line, point], "layout": layout, "height": 340, "label": label}


def _memory(plan: Plan) -> dict[str, Any]:
    """What fills the fullest device, beside what it has."""
    found = plan.memory
    assert found is not None
    parts = {
        "weights": found.weights_bytes,
        "gradients": found.gradients_bytes,
        "optimizer": found.optimizer_bytes,
        "activations": found.activations_bytes or 0,
        "logits": found.logits_bytes or 0,
    }
    needed = "needed" if found.activations_bytes is not None else "needed, at least"
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [needed],
            "x": [float(count)],
            "marker": {"color": colour},
            "text": [f"{count:,} bytes"],
            "textposition": "none",
            "hovertemplate": f"{name}: %{{text}}<extra></extra>",
        }
        for (name, count), colour in zip(parts.items(), _COLOURS, strict=True)
        if count
    ]
    if plan.device_memory_bytes:
        bars.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": "device",
                "y": ["device"],
                "x": [float(plan.device_memory_bytes)],
                "marker": {"color": "#8a929c"},
                "text": [f"{plan.device_memory_bytes:,} bytes"],
                "textposition": "none",
                "hovertemplate": "device: %{text}<extra></extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "bytes"}, "tickformat": "~s", "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    }
    return {"data": bars, "layout": layout, "height": 230, "label": "Training memory of the fullest device"}


def _step(compute_s: float, memory_s: float) -> dict[str, Any]:
    """The two bounds of a decoding step: the longer one holds."""
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": ["products", "memory"],
        "x": [compute_s, memory_s],
        "marker": {"color": [_COLOURS[0], _COLOURS[1]]},
        "hovertemplate": "%{y}: %{x:.4s}s<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "s a step"}, "tickformat": "~s", "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    return {"data": [bar], "layout": layout, "height": 190, "label": "What bounds a decoding step"}
