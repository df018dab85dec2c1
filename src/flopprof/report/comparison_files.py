"""Comparison -> CSV with exact figures, Markdown, and small tables for a notebook."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Sequence

from flopprof.compare.comparison import FIGURES, SIZES, Comparison, Row
from flopprof.report.comparison import Table, facts, tables
from flopprof.report.markdown import escaped, pipe_table

COLUMNS = (
    *("model", "inputs", "dtype", "device", "samples", "tokens", "attention"),
    *("n_params", "n_params_trainable", "forward_flops", "backward_flops", "recompute_flops", "training_flops"),
    *("macs", "elementwise_flops", "sparse_forward_flops", "nonzero_weights", "weights"),
    *("activation_bytes", "weight_bytes", "gradient_bytes", "optimizer_bytes", "training_bytes"),
    *(f"{name}_bytes" for name in SIZES),
    *("bytes_moved", "arithmetic_intensity", "metric", "dataset", "accuracy", "pareto", "hardware"),
    *("ideal_s", "bound", "median_s", "p95_s", "samples_per_s", "measured_on"),
    *(f"{name}_ratio" for name in FIGURES),
    *("uncounted", "failed"),
)


def to_csv(comparison: Comparison) -> str:
    """A row a model, columns as in COLUMNS: integers and floats as they are, empty where not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    ratios = {name: comparison.ratios(name) for name in FIGURES}
    front = comparison.pareto()
    for row in comparison.rows:
        spoken = [ratios[name][row.name] for name in FIGURES]
        uncounted = " ".join(f"{op}:{calls}" for op, calls in row.uncounted.items())
        cells = [*_cells(row, row.name in front), *spoken, uncounted, row.failed]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def _cells(row: Row, on_front: bool) -> Iterator[object]:
    yield from (row.name, row.inputs, row.dtype, row.device, row.samples, row.tokens, row.attention)
    yield from (row.n_params, row.n_params_trainable, row.forward_flops, row.backward_flops)
    yield from (None if row.failed else row.recompute_flops, row.training_flops)
    yield from (row.macs, row.elementwise_flops, row.sparse_forward_flops)
    yield from (None, None) if row.density is None else (row.density.nonzero, row.density.elements)
    memory = row.memory
    yield from (
        (None,) * 5
        if memory is None
        else (memory.activations, memory.weights, memory.gradients, memory.optimizer, memory.peak)
    )
    yield from (row.size_bytes.get(name) for name in SIZES)
    yield from (row.bytes_moved, row.arithmetic_intensity)
    accuracy, ideal, latency = row.accuracy, row.ideal, row.latency
    yield from (None, None, None) if accuracy is None else (accuracy.metric, accuracy.dataset, accuracy.value)
    yield None if accuracy is None else int(on_front)
    yield from (None, None, None) if ideal is None else (ideal.device, ideal.seconds, ideal.bound)
    yield from (
        (None,) * 4 if latency is None else (latency.median_s, latency.p95_s, latency.samples_per_s, latency.device)
    )


def to_markdown(comparison: Comparison) -> str:
    """The tables and how to read them, as GitHub-flavoured Markdown."""
    parts = ["# Models compared", ""]
    for table in tables(comparison):
        heads = [_head(column.head) for column in table.columns]
        lefts = sum(not column.number for column in table.columns[:2]) if table.rows else 1
        rows = [[escaped(cell.strip()) for cell in row] for row in table.rows]
        parts += [f"## {escaped(table.title)}", "", *pipe_table(heads, rows, names=lefts), ""]
    parts += [f"- {f'**{escaped(label)}**: ' if label else ''}{escaped(text)}" for label, text in facts(comparison)]
    return "\n".join(parts) + "\n"


def to_html(comparison: Comparison) -> str:
    """The tables as static HTML for a notebook: no script, no style sheet, every name escaped."""
    parts = [_html_table(table) for table in tables(comparison)]
    lines = "<br>".join(f"<b>{html.escape(label)}</b> {html.escape(text)}" for label, text in facts(comparison))
    return f"{''.join(parts)}<p>{lines}</p>"


def _html_table(table: Table) -> str:
    sides = ["right" if column.number else "left" for column in table.columns]

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f'<{tag} style="text-align:{side}">{html.escape(text.strip())}</{tag}>'
            for side, text in zip(sides, texts, strict=True)
        )

    heads = cells("th", [_head(column.head) for column in table.columns])
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return (
        f"<p><b>{html.escape(table.title)}</b></p><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    )


def _head(text: str) -> str:
    name, _, unit = text.partition("\n")
    return f"{name} ({unit})" if unit else name
