"""Ledger -> the waterfall from 2 N T and 6 N T to the measured count, as charts and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flopprof.ledger import Ledger, Term
from flopprof.report.html.elements import escape, exact, facts, figure, paragraph
from flopprof.report.html.page import Section
from flopprof.report.ledger import stages, verdict, words
from flopprof.units import format_share, format_si

_ITEMS = 12
_COLOURS = {"increasing": "#d9772b", "decreasing": "#3f9d6c", "totals": "#3b82c4"}


def section(ledger: Ledger | None, reason: str = "") -> Section:
    """The waterfalls of a ledger, every term with its sentence; or the reason why there is no ledger."""
    if ledger is None:
        return Section(anchor="ledger", title="Why not 2 N T", body=paragraph(f"Not reconciled: {reason}"))
    figures = {}
    body = ""
    for number, part in enumerate(stages(ledger)):
        name = f"waterfall-{number}"
        chart = _waterfall(part)
        figures[name] = {"data": chart["data"], "layout": chart["layout"]}
        body += f"<h3>{escape(part.estimate)} to {escape(part.measured)}</h3>"
        label = f"From {part.estimate} to {part.measured}, as in the table below"
        body += figure(name, label=label, height=chart["height"]) + _table(part)
    trained = ledger.backward is not None
    body += "<h3>What it means</h3>" + facts(verdict(ledger))
    return Section(anchor="ledger", title=f"Why not {6 if trained else 2} N T", body=body, figures=figures)


def _shown(ledger: Ledger) -> Iterator[Term]:
    return (term for term in ledger.terms if term.flops)


def _waterfall(ledger: Ledger) -> dict[str, Any]:
    steps = [
        (ledger.estimate, ledger.estimate_flops, "absolute"),
        *((words(term), term.flops, "relative") for term in _shown(ledger)),
        (ledger.measured, ledger.measured_flops, "total"),
    ]
    trace = {
        "type": "waterfall",
        "orientation": "h",
        "y": [name for name, _, _ in steps],
        "x": [float(flops) for _, flops, _ in steps],
        "measure": [kind for _, _, kind in steps],
        "text": [f"{'+' if kind == 'relative' and flops > 0 else ''}{flops:,} FLOPs" for _, flops, kind in steps],
        "textposition": "none",
        "hovertemplate": "%{y}<br>%{text}<extra></extra>",
        "connector": {"line": {"width": 1, "color": "#8a929c"}},
        **{kind: {"marker": {"color": colour}} for kind, colour in _COLOURS.items()},
    }
    layout = {
        "xaxis": {"title": {"text": "FLOPs"}, "automargin": True, "tickformat": "~s"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "showlegend": False,
    }
    return {"data": [trace], "layout": layout, "height": 90 + 32 * len(steps)}


def _table(ledger: Ledger) -> str:
    caption = f"From {ledger.estimate} to {ledger.measured}"
    rows = _row(escape(ledger.estimate), ledger.estimate_flops, ledger.estimate_flops, css="sum")
    for term in ledger.terms:
        if term.flops or term.flops_full:
            rows += _row(_reason(term), term.flops, ledger.estimate_flops, signed=True)
    rows += _row(f"= {escape(ledger.measured)}", ledger.measured_flops, ledger.estimate_flops, css="sum")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="steps">'
        f'<caption class="unseen">{escape(caption)}</caption><thead><tr><th scope="col">Step</th>'
        '<th scope="col" class="number">FLOPs</th><th scope="col" class="number">Of the estimate</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(first: str, flops: int, estimate: int, *, signed: bool = False, css: str = "") -> str:
    sign = "+" if signed and flops > 0 else ""
    share = format_share(flops, estimate)
    return (
        f'<tr class="{css}"><th scope="row">{first}</th><td class="number">{sign}{exact(flops)}</td>'
        f'<td class="number">{sign if share else ""}{share}</td></tr>'
    )


def _reason(term: Term) -> str:
    """The term, its sentence, and its largest items to be opened."""
    text = f'<strong>{escape(words(term))}</strong><br><span class="note">{escape(term.sentence)}'
    if term.flops_full != term.flops_causal:
        text += (
            f" Over every query-key pair {term.flops_full:,} FLOPs; over those that the mask lets through "
            f"{term.flops_causal:,}."
        )
    text += "</span>"
    items = [f"{item.name or '(root)'}: {item.flops:,} FLOPs" for item in term.items[:_ITEMS]]
    if len(term.items) > _ITEMS:
        rest = sum(item.flops for item in term.items[_ITEMS:])
        items.append(f"{len(term.items) - _ITEMS} more: {rest:,} FLOPs ({format_si(rest, 'FLOPs')})")
    if items:
        text += f"<details><summary>{len(term.items)} {'part' if len(term.items) == 1 else 'parts'}</summary><ul>"
        text += "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul></details>"
    return text
