"""Steps that a Meter recorded -> a page: MFU, time and throughput step by step, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flopprof.meter.figures import Figures, StepRecord, figures, timed
from flopprof.meter.records import Process
from flopprof.report.html.elements import Head, escape, exact, facts, figure, paragraph, scaled, table
from flopprof.report.html.page import Section, page, plot_text
from flopprof.units import format_share, format_si

_POINTS = 1000
_LINE, _OTHER = "#3b82c4", "#d9772b"


def render(processes: Sequence[Process], *, title: str = "Run", heading: str = "") -> str:
    """The page of what processes wrote, one after the other (restarts) or side by side (ranks: a line each).

    Raises MissingPackage without plotly.
    """
    sections = [_totals(processes), *_steps(processes), _time(processes)]
    return page(title, heading, sections)


@dataclass(frozen=True)
class _Point:
    """Neighbouring timed steps, drawn as one: the last one's number, their figures, and how many they are."""

    step: int
    figures: Figures
    steps: int


def _totals(processes: Sequence[Process]) -> Section:
    names = [_name(process, i, len(processes)) for i, process in enumerate(processes)]
    found = [figures(timed(process.records), process.peaks.get, process.start.bytes_per_s) for process in processes]
    body = ""
    lines: list[tuple[str, str]] = []
    if len(processes) == 1:
        body = f'<dl class="cards">{_boxes(found[0])}</dl>' if found[0] is not None else ""
    else:
        body = _table(processes, names, found)
    for name, process, whole in zip(names, processes, found, strict=True):
        lines.append((name, f"{len(process.records):,} steps, of which {len(timed(process.records)):,} are timed"))
        lines += [*(_facts(whole) if whole is not None else ()), *_about(process, whole)]
    lines.append(("convention", f"a multiply-add is 2 FLOPs; attention {processes[0].start.attention}"))
    return Section(anchor="totals", title="Totals", body=f"{body}{facts(lines)}")


def _boxes(whole: Figures) -> str:
    cards = [
        ("MFU", _percent(whole.mfu), "model FLOPs over what the peak would do"),
        ("HFU", _percent(whole.hfu), "everything executed"),
        ("step time", _seconds(whole.step_time_s.median), "median"),
        ("model", format_si(whole.model_flops_per_s, "FLOP/s"), f"{exact(whole.model_flops)} FLOPs"),
        ("throughput", _throughput(whole), ""),
    ]
    return "".join(
        f'<div><dt>{escape(label)}</dt><dd>{escape(value)}<span class="integer">{escape(note)}</span></dd></div>'
        for label, value, note in cards
        if value
    )


def _table(processes: Sequence[Process], names: Sequence[str], found: Sequence[Figures | None]) -> str:
    heads = [
        *(Head("Process"), Head("Steps"), Head("Timed"), Head("MFU"), Head("HFU")),
        *(Head("Step time", "median"), Head("Model", "FLOPs"), Head("Throughput")),
    ]
    rows = []
    for name, process, whole in zip(names, processes, found, strict=True):
        cells = [""] * 5
        if whole is not None:
            median = _seconds(whole.step_time_s.median)
            cells = [_percent(whole.mfu), _percent(whole.hfu), median, exact(whole.model_flops), _throughput(whole)]
        rows.append([name, exact(len(process.records)), exact(len(timed(process.records))), *cells])
    return table(heads, rows, caption="Figures of each process")


def _throughput(whole: Figures) -> str:
    for value, unit in ((whole.tokens_per_s, "tokens/s"), (whole.samples_per_s, "samples/s")):
        if value is not None:
            return format_si(value, unit)
    return ""


def _facts(whole: Figures) -> Iterator[tuple[str, str]]:
    time = whole.step_time_s
    yield "", f"model {scaled(whole.model_flops)}, hardware {scaled(whole.hardware_flops)} in {whole.time_s:.3f} s"
    yield (
        "",
        f"step time {_seconds(time.median)} (median; 10 % {_seconds(time.p10)}, 90 % {_seconds(time.p90)}, "
        f"99 % {_seconds(time.p99)})",
    )
    if whole.mbu is not None:
        yield "", f"MBU {_percent(whole.mbu)}: operands and results of counted operators, each once"


def _about(process: Process, whole: Figures | None) -> Iterator[tuple[str, str]]:
    start = process.start
    against = ", ".join(f"{format_si(rate, 'FLOP/s')} {dtype}" for dtype, rate in process.peaks.items())
    if against:
        yield "", f"against {against} ({start.peak}{', measured' if start.peak_measured else ''}), on {start.device}"
    if whole is not None and whole.mfu is None:
        yield "", f"no MFU: {process.reason or 'no peak is known'}"
    uncounted = sum(record.uncounted for record in process.records)
    if uncounted:
        yield "", f"{uncounted:,} calls of operators without a formula: FLOPs are at least what is said"
    out: dict[str, int] = {}
    for record in process.records:
        for reason in record.left_out[:1] or (("uncounted",) if record.flops is None else ()):
            out[reason] = out.get(reason, 0) + 1
    if out:
        yield "", f"left out: {', '.join(f'{count:,} {reason}' for reason, count in out.items())}"


# --- step by step ----------------------------------------------------------------------------------
def _steps(processes: Sequence[Process]) -> Iterator[Section]:
    """A chart per figure, a line per process; nothing where no step is timed."""
    lines = [
        (_name(process, i, len(processes)), _points(timed(process.records), process.peaks, process.start.bytes_per_s))
        for i, process in enumerate(processes)
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
def _time(processes: Sequence[Process]) -> Section:
    """Seconds in steps that figures are made of, in those left out, and outside of steps."""
    rows = {name: [0.0] * len(processes) for name in ("timed_steps", "steps_left_out", "data_wait", "evaluation")}
    for i, process in enumerate(processes):
        for name, seconds in _seconds_of(process):
            rows.setdefault(name, [0.0] * len(processes))[i] += seconds
    names = [_name(process, i, len(processes)) for i, process in enumerate(processes)]
    shown = {name: row for name, row in rows.items() if any(row)}
    totals = [sum(column) for column in zip(*shown.values(), strict=True)] or [0.0] * len(names)
    cells = [
        [name.replace("_", " "), *(f"{seconds:.3f}" for seconds in row), _part(sum(row), sum(totals))]
        for name, row in shown.items()
    ]
    cells.append(["all", *(f"{seconds:.3f}" for seconds in totals), _part(sum(totals), sum(totals))])
    heads = [Head("Time"), *(Head(name, "s") for name in names), Head("Share")]
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [name.replace("_", " ") for name in shown],
        "x": [sum(row) for row in shown.values()],
        "marker": {"color": [_LINE if name == "timed_steps" else _OTHER for name in shown]},
        "hovertemplate": "%{y}: %{x:.3f} s<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "s"}, "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    body = figure("times", label="Where the time went, as in the table", height=90 + 32 * len(shown))
    body += table(heads, cells, caption="Where the time went")
    figures_ = {"times": {"data": [trace], "layout": layout}}
    return Section(anchor="time", title="Where the time went", body=body, figures=figures_)


def _seconds_of(process: Process) -> Iterator[tuple[str, float]]:
    for record in process.records:
        counted = record.flops is not None and not record.left_out
        yield "timed_steps" if counted else "steps_left_out", record.step_time_s
        yield "data_wait", record.data_wait_s
        yield "evaluation", record.evaluation_s
        yield from record.paused_s.items()


def _name(process: Process, place: int, of: int) -> str:
    if process.start.world_size > 1:
        return f"rank {process.start.rank}"
    return f"start {place + 1}" if of > 1 else "run"


def _part(seconds: float, whole: float) -> str:
    return format_share(round(seconds * 10**9), round(whole * 10**9))


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.3f} ms"
