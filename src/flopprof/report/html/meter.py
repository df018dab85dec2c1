"""Steps that a Meter recorded -> a page: MFU, time and throughput step by step, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flopprof.meter.figures import Figures, StepRecord, figures, timed
from flopprof.meter.records import Process
from flopprof.meter.runs import Run, filled, world_of_runs
from flopprof.meter.summary import format_time, percent
from flopprof.report.html.elements import Head, escape, exact, facts, figure, paragraph, table
from flopprof.report.html.page import Section, page, plot_text
from flopprof.units import format_share, format_si

_POINTS = 1000
_LINE, _OTHER = "#3b82c4", "#d9772b"


def render(runs: Sequence[tuple[str, Run, Sequence[Process]]], *, title: str = "Run", heading: str = "") -> str:
    """The page of runs: of each rank its name, what its records add up to, and the processes that wrote them.

    Raises MissingPackage without plotly.
    """
    lines = [
        (_line(place, runs, start), filled(process.records), process)
        for place, (_, _, processes) in enumerate(runs)
        for start, process in enumerate(processes)
    ]
    return page(title, heading, [_totals(runs), *_steps(lines), _time(runs)])


@dataclass(frozen=True)
class _Point:
    """Neighbouring timed steps, drawn as one: the last one's number, their figures, and how many they are."""

    step: int
    figures: Figures
    steps: int


def _totals(runs: Sequence[tuple[str, Run, Sequence[Process]]]) -> Section:
    world = world_of_runs([run for _, run, _ in runs])
    body = "" if world is None else f"<h3>All ranks</h3>{facts(world.facts())}"
    if len(runs) > 1:
        body += _table([(_name(place, runs), run) for place, (_, run, _) in enumerate(runs)])
    for place, (_, run, _) in enumerate(runs):
        lines = [line for line in run.summary.facts() if line[0] != "time"] + run.facts()
        if len(runs) > 1:
            body += f"<h3>{escape(_name(place, runs))}</h3>"
        elif run.summary.whole is not None:
            body += f'<dl class="cards">{_boxes(run.summary.whole)}</dl>'
        body += facts(lines)
    return Section(anchor="totals", title="Totals", body=body)


def _boxes(whole: Figures) -> str:
    cards = [
        ("MFU", percent(whole.mfu), "model FLOPs over what the peak would do"),
        ("HFU", percent(whole.hfu), "everything executed"),
        ("step time", format_time(whole.step_time_s.median), "median"),
        ("model", format_si(whole.model_flops_per_s, "FLOP/s"), f"{exact(whole.model_flops)} FLOPs"),
        ("throughput", _throughput(whole), ""),
    ]
    return "".join(
        f'<div><dt>{escape(label)}</dt><dd>{escape(value)}<span class="integer">{escape(note)}</span></dd></div>'
        for label, value, note in cards
        if value
    )


def _table(runs: Sequence[tuple[str, Run]]) -> str:
    heads = [
        *(Head("Run"), Head("Steps"), Head("Timed"), Head("MFU"), Head("HFU")),
        *(Head("Step time", "median"), Head("Model", "FLOPs"), Head("Throughput")),
    ]
    rows = []
    for name, run in runs:
        whole = run.summary.whole
        cells = ["0", *[""] * 5]
        if whole is not None:
            median = format_time(whole.step_time_s.median)
            cells = [exact(whole.steps), percent(whole.mfu), percent(whole.hfu), median, exact(whole.model_flops)]
            cells.append(_throughput(whole))
        rows.append([name, exact(run.summary.steps), *cells])
    return table(heads, rows, caption="Figures of each run")


def _throughput(whole: Figures) -> str:
    for value, unit in ((whole.tokens_per_s, "tokens/s"), (whole.samples_per_s, "samples/s")):
        if value is not None:
            return format_si(value, unit)
    return ""


# --- step by step ----------------------------------------------------------------------------------
def _steps(processes: Sequence[tuple[str, Sequence[StepRecord], Process]]) -> Iterator[Section]:
    """A chart per figure, a line per process; nothing where no step is timed."""
    lines = [
        (name, _points(timed(records), process.peaks, process.start.bytes_per_s))
        for name, records, process in processes
    ]
    if not any(points for _, points in lines):
        return
    charts: dict[str, tuple[str, dict[str, Any]]] = {
        "mfu": ("MFU by step", _chart(lines, "MFU", ".1%", lambda found: found.mfu)),
        "hfu": ("HFU by step", _chart(lines, "HFU", ".1%", lambda found: found.hfu)),
        "step-time": ("Time of a step", _chart(lines, "s", "~s", lambda found: found.time_s / found.steps)),
        "tokens": ("Tokens per second", _chart(lines, "tokens/s", "~s", lambda found: found.tokens_per_s)),
        "samples": ("Samples per second", _chart(lines, "samples/s", "~s", lambda found: found.samples_per_s)),
    }
    body = ""
    shown = {name: chart for name, (_, chart) in charts.items() if chart["data"]}
    if "mfu" in shown and shown.get("hfu", {}).get("same") == shown["mfu"]["same"]:
        del shown["hfu"]  # nothing was executed besides: it is the same line
    if "tokens" in shown:
        shown.pop("samples", None)
    for name in shown:
        body += f"<h3>{escape(charts[name][0])}</h3>" + figure(name, label=charts[name][0], height=280)
    merged = max((point.steps for _, points in lines for point in points), default=1)
    if merged > 1:
        body += paragraph(f"A point is up to {merged} steps in a row, taken together.", css="note")
    yield Section(
        anchor="by-step",
        title="Step by step",
        body=body,
        figures={name: {"data": chart["data"], "layout": chart["layout"]} for name, chart in shown.items()},
    )


def _points(records: Sequence[StepRecord], peaks: Mapping[str, float], bandwidth: float | None) -> list[_Point]:
    size = -(-len(records) // _POINTS) or 1
    points = []
    for start in range(0, len(records), size):
        some = records[start : start + size]
        found = figures(some, peaks.get, bandwidth)
        if found is not None:
            points.append(_Point(some[-1].step, found, len(some)))
    return points


def _chart(lines: Sequence[tuple[str, Sequence[_Point]]], unit: str, form: str, value: Any) -> dict[str, Any]:
    """One figure of each process by step. value: Figures -> float or None."""
    traces = []
    precise = form.replace("~s", ".4s")
    for name, points in lines:
        found = [(point.step, value(point.figures)) for point in points]
        found = [(step, number) for step, number in found if number is not None]
        if found:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(found) == 1 else "lines",
                    "name": plot_text(name),
                    "x": [step for step, _ in found],
                    "y": [number for _, number in found],
                    "line": {"width": 1.5, **({"color": _LINE} if len(lines) == 1 else {})},
                    "hovertemplate": f"step %{{x}}: %{{y:{precise}}} {unit}<extra>%{{fullData.name}}</extra>",
                }
            )
    layout = {
        "xaxis": {"title": {"text": "step"}, "automargin": True},
        "yaxis": {"title": {"text": unit}, "tickformat": form, "rangemode": "tozero", "automargin": True},
        "showlegend": len(lines) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout, "same": [trace["y"] for trace in traces]}


# --- where the time went ---------------------------------------------------------------------------
def _time(runs: Sequence[tuple[str, Run, Sequence[Process]]]) -> Section:
    """Seconds of the wall clock: in steps that count, in those that do not, and outside of steps."""
    names = list(dict.fromkeys(name for _, run, _ in runs for name in run.rows))
    rows = {name: [run.rows.get(name, 0.0) for _, run, _ in runs] for name in names}
    shown = {name: row for name, row in rows.items() if any(row) or name == "steps"}
    walls = [run.wall_s for _, run, _ in runs]
    cells = [
        [name.replace("_", " "), *(f"{seconds:.3f}" for seconds in row), _part(sum(row), sum(walls))]
        for name, row in shown.items()
    ]
    cells.append(["wall clock", *(f"{seconds:.3f}" for seconds in walls), _part(sum(walls), sum(walls))])
    heads = [Head("Time"), *(Head(_name(place, runs), "s") for place in range(len(runs))), Head("Share")]
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [name.replace("_", " ") for name in shown],
        "x": [sum(row) for row in shown.values()],
        "marker": {"color": [_LINE if name == "steps" else _OTHER for name in shown]},
        "hovertemplate": "%{y}: %{x:.3f} s<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "s"}, "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    body = figure("times", label="Where the time went, as in the table", height=90 + 32 * len(shown))
    body += table(heads, cells, caption="Where the time went")
    charts = {"times": {"data": [trace], "layout": layout}}
    return Section(anchor="time", title="Where the time went", body=body, figures=charts)


def _name(place: int, runs: Sequence[tuple[str, Run, Sequence[Process]]]) -> str:
    name, run, _ = runs[place]
    ranks = {other.rank for _, other, _ in runs}
    if run.world_size > 1 and len(ranks) == len(runs):
        return f"rank {run.rank}"
    return name if len(runs) > 1 else "run"


def _line(place: int, runs: Sequence[tuple[str, Run, Sequence[Process]]], start: int) -> str:
    several = len(runs[place][2]) > 1
    return f"{_name(place, runs)}, start {start + 1}" if several else _name(place, runs)


def _part(seconds: float, whole: float) -> str:
    return format_share(round(seconds * 10**9), round(whole * 10**9))
