"""Comparison -> a page: models as points, whichever two figures one asks for, and all of their figures in a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from flopprof.compare.comparison import FIGURES, Comparison, Row
from flopprof.report.html.elements import Head, escape, exact, facts, figure, paragraph, table
from flopprof.report.html.page import Section, page

Value = int | float | None


@dataclass(frozen=True)
class _Column:
    """One figure: its key in FIGURES, its head and unit; count: an integer that is printed whole."""

    key: str
    head: str
    unit: str
    count: bool = True
    bound: bool = False  # a lower bound where operators are uncounted

    @property
    def value(self) -> Callable[[Row], Value]:
        """What reads the figure of a row."""
        return FIGURES[self.key]


_COLUMNS = (
    _Column("params", "Parameters", ""),
    _Column("flops", "Forward", "FLOPs", bound=True),
    _Column("training", "Training step", "FLOPs", bound=True),
    _Column("macs", "Forward", "MACs", bound=True),
    _Column("elementwise", "Elementwise", "FLOPs, apart"),
    _Column("activations", "Activations", "bytes"),
    _Column("memory", "Training memory", "bytes"),
    _Column("bytes", "Moved", "bytes"),
    _Column("intensity", "Intensity", "FLOP/byte", count=False),
    _Column("size", "Size on disk", "bytes"),
    _Column("accuracy", "Accuracy", "as published", count=False),
    _Column("ideal", "Ideal latency", "s", count=False),
    _Column("latency", "Latency", "s, median", count=False),
    _Column("p95", "Latency", "s, p95", count=False),
    _Column("throughput", "Throughput", "samples/s", count=False),
)


def render(comparison: Comparison, *, heading: str = "") -> str:
    """The page of a comparison. heading: how it was made. Raises MissingPackage without plotly."""
    shown = [column for column in _COLUMNS if any(column.value(row) is not None for row in comparison)]
    parts = [*_chart(comparison, shown), _listing(comparison, shown), *_notes(comparison)]
    models = "1 model" if len(comparison) == 1 else f"{len(comparison)} models"
    return page(f"{models} compared", heading, parts)


def _chart(comparison: Comparison, columns: list[_Column]) -> Iterator[Section]:
    """The scatter of two figures; nothing where fewer than two are known."""
    keys = [column.key for column in columns]
    if len(keys) < 2:
        return
    across = "flops" if "flops" in keys else keys[0]
    up = "accuracy" if "accuracy" in keys else next(key for key in keys if key != across)
    choices = _choice("Across", "across", across, columns) + _choice("Up", "up", up, columns)
    body = f'<div class="controls scripted-only">{choices}</div>'
    body += figure("scatter", label="Two figures of each model; the table below has all of them", height=480)
    if comparison.pareto():
        body += paragraph(
            "Filled: no other model has as good an accuracy, of the same metric on the same data, for fewer FLOPs a "
            "sample.",
            css="note",
        )
    yield Section(anchor="chart", title="Chart", body=body)


def _choice(label: str, name: str, chosen: str, columns: list[_Column]) -> str:
    options = ""
    for column in columns:
        selected = " selected" if column.key == chosen else ""
        unit = f", {column.unit}" if column.unit else ""
        options += f'<option value="{column.key}"{selected}>{escape(column.head + unit)}</option>'
    return f'<label>{label} <select id="{name}">{options}</select></label>'


def _listing(comparison: Comparison, columns: list[_Column]) -> Section:
    """Every figure of every model, in a table to sort and search; without scripts the same, as it stands."""
    rows = [row for row in comparison if not row.failed]
    body = (
        '<div class="controls scripted-only"><label>Search <input type="search" id="search" autocomplete="off" '
        'placeholder="name" aria-controls="listing"></label><span id="found" role="status" aria-live="polite"></span>'
        '</div><div id="listing" class="scripted-only"></div>'
    )
    ratios = comparison.ratios("flops")
    heads = [Head("Model"), Head("FLOPs", "of the first"), *(Head(column.head, column.unit) for column in columns)]
    cells = [[row.name, _ratio(ratios[row.name]), *(_text(row, column) for column in columns)] for row in rows]
    body += f"<noscript>{table(heads, cells, caption='Figures of each model')}</noscript>"
    optimal = comparison.pareto()
    data: dict[str, Any] = {
        "reference": comparison.reference,
        "columns": [
            {"key": column.key, "head": column.head, "unit": column.unit, "count": column.count} for column in columns
        ],
        "rows": [
            {
                "name": row.name,
                "pareto": row.name in optimal,
                "ratio": ratios[row.name],
                "values": [column.value(row) for column in columns],
                "texts": [_text(row, column) for column in columns],
            }
            for row in rows
        ],
    }
    return Section(
        anchor="models", title="Figures", body=body, data={"comparison": data}, scripts=("table", "comparison")
    )


def _notes(comparison: Comparison) -> Iterator[Section]:
    """What each model was run on, what is not known of it and why, and what failed."""
    lines = [("failed", f"{row.name}: {row.failed}") for row in comparison if row.failed]
    if comparison.interrupted:
        lines.append(("interrupted", "not every model was counted"))
    if comparison.reference:
        lines.append(("ratios", f"to {comparison.reference}"))
    if comparison.hardware:
        lines.append(("ideal", f"the longer of FLOPs / peak and bytes / bandwidth on {comparison.hardware}"))
    lines.append(("convention", "1 multiply-add = 2 FLOPs; elementwise FLOPs are in none of the other counts"))
    for row in comparison:
        if not row.failed:
            run = [row.inputs or row.dtype, row.device, f"attention {row.attention}"]
            lines.append((row.name, ", ".join(part for part in run if part)))
            lines += [("", text) for text in _told(row)]
    yield Section(anchor="notes", title="Notes", body=facts(lines))


def _told(row: Row) -> Iterator[str]:
    if row.accuracy is not None:
        found = row.accuracy
        yield f"{found.metric} {found.value} on {found.dataset}, as published for {found.weights}"
    if row.uncounted:
        yield f"FLOPs are at least what is said: no formula for {', '.join(row.uncounted)}"
    if row.sparse_forward_flops is not None:
        yield f"{row.sparse_forward_flops:,} FLOPs forward if products with zeros were left out"
    yield from (*row.assumptions, *row.notes)


def _text(row: Row, column: _Column) -> str:
    value: Value = column.value(row)
    if value is None:
        return ""
    bound: Literal["≥ ", ""] = "≥ " if column.bound and row.uncounted else ""
    return f"{bound}{exact(int(value))}" if column.count else f"{value:.5g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}x"
