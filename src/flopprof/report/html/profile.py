"""Profile -> a page: totals, modules, operators and phases, the waterfall, the roofline, every module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flopprof.errors import UsageError
from flopprof.hardware.table import Device
from flopprof.ledger import Ledger
from flopprof.profile import PHASES, Phase, Profile
from flopprof.report.facts import idle_experts
from flopprof.report.html import ledger as waterfall
from flopprof.report.html import modules, roofline
from flopprof.report.html.elements import Head, escape, exact, facts, figure, paragraph, scaled, table
from flopprof.report.html.page import Section, page, plot_text
from flopprof.units import format_bytes, format_share, format_si

PHASE_COLOURS = {"forward": "#3b82c4", "backward": "#d9772b", "recompute": "#b5588f", "optimizer": "#3f9d6c"}
_BARS = 25
_CONVENTIONS = {
    "full": "full: every query-key pair counted",
    "causal": "causal: only the query-key pairs that the mask lets through",
}


def render(profile: Profile, *, heading: str = "", hardware: Device | None = None) -> str:
    """The page of a profile. heading: what was run (inputs, mode, device); hardware: whose roof is shown first.

    Raises MissingPackage without plotly.
    """
    why = waterfall.section(*_reconciled(profile))
    parts = [totals(profile), modules.chart(profile), *operators(profile), why, *roofline.section(profile, hardware)]
    return page(profile.target or "Profile", heading, [*parts, modules.listing(profile)])


def render_reconciled(profile: Profile, ledger: Ledger, *, heading: str = "") -> str:
    """The page of a ledger of this profile: why its count is not 2 N T or 6 N T, then where the FLOPs are."""
    parts = [waterfall.section(ledger), totals(profile), modules.chart(profile), *operators(profile)]
    return page(f"{profile.target or 'Profile'}, reconciled", heading, [*parts, modules.listing(profile)])


def _reconciled(profile: Profile) -> tuple[Ledger | None, str]:
    """The ledger, or why there is none."""
    try:
        return profile.reconcile(), ""
    except UsageError as error:
        return None, str(error)


# --- totals ----------------------------------------------------------------------------------------
def totals(profile: Profile) -> Section:
    """The figures of the whole run as exact integers, their convention, and what is uncounted or assumed."""
    holes = {row.phase for row in profile.uncounted_rows}
    bound = ">= " if holes else ""
    cards = [("forward", profile.forward_flops, "forward" in holes)]
    if len(modules.phases_of(profile)) > 1:
        cards += [
            *((PHASES[i], profile.by_phase()[PHASES[i]], PHASES[i] in holes) for i in modules.phases_of(profile)[1:]),
            ("model: forward + backward", profile.model_flops, bool(holes & {"forward", "backward"})),
            ("hardware: all executed", profile.hardware_flops, bool(holes)),
        ]
    if profile.experts:
        cards.append(("active: only chosen experts", profile.active_flops, bool(holes & {"forward", "backward"})))
    boxes = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{'&ge; ' if at_least else ''}{escape(format_si(flops, 'FLOPs'))}"
        f'<span class="integer">{exact(flops)} FLOPs</span></dd></div>'
        for label, flops, at_least in cards
    )
    boxes += (
        f"<div><dt>parameters</dt><dd>{escape(format_si(profile.n_params))}"
        f'<span class="integer">{exact(profile.n_params)}</span></dd></div>'
    )
    warning = ""
    if profile.uncounted_rows:
        named = ", ".join(f"{op} ({_times(calls)})" for op, calls in profile.uncounted.items())
        reasons = dict.fromkeys(row.reason for row in profile.uncounted_rows if row.reason)
        warning = paragraph(
            f"No formula for {named}: what they do is in no number here, so FLOPs are at least what is said."
            + "".join(f" {reason}" for reason in reasons),
            css="warning",
        )
    lines = [("MACs", f"{bound}{scaled(profile.macs, 'MACs')} of the model: 1 MAC = 1 multiply-add = 2 FLOPs")]
    return Section(
        anchor="totals",
        title="Totals",
        body=f'<dl class="cards">{boxes}</dl>{warning}{facts([*lines, *_facts(profile)])}',
    )


def _facts(profile: Profile) -> Iterator[tuple[str, str]]:
    if idle := idle_experts(profile):
        yield "active", f"{scaled(profile.active_flops)}, of the model's: {idle}"
    yield "elementwise", f"{scaled(profile.elementwise_flops)}, apart: in none of the numbers above"
    if profile.bytes_moved:
        moved = profile.bytes_moved
        yield (
            "bytes moved",
            f"{exact(moved)} bytes ({format_bytes(moved)}) by counted operators, each operand read and each result "
            f"written once: {profile.hardware_flops / moved:.4g} FLOPs a byte",
        )
    if profile.n_params:
        yield "trainable", f"{exact(profile.n_params_trainable)} of {exact(profile.n_params)} parameters"
    attention = f"counted as {_CONVENTIONS[profile.attention]}"
    if profile.causal_flops != profile.with_attention("full").model_flops:
        full, causal = (profile.with_attention(kind).model_flops for kind in ("full", "causal"))
        attention += f"; model FLOPs with full attention {full:,}, causal {causal:,}"
    yield "attention", attention
    for label, count in (("tokens", profile.tokens), ("samples", profile.samples)):
        if count is not None:
            yield label, exact(count)
    yield "device", f"{profile.device}, torch {profile.torch_version}" if profile.torch_version else profile.device
    for row in sorted(profile.routing, key=lambda row: -row.load)[:1]:
        yield "expert load", f"max/mean {row.load:.2f} in {row.fqn or 'the root'}, the fullest of its routers"
    for i, assumption in enumerate(profile.assumptions):
        yield "" if i else "assumed", assumption


def _times(calls: int) -> str:
    return "1 call" if calls == 1 else f"{calls} calls"


# --- operators, phases, dtypes ---------------------------------------------------------------------
def operators(profile: Profile) -> Iterator[Section]:
    """FLOPs by operator and phase, and by dtype; nothing where no counted operator ran."""
    if not profile.operators:
        return
    phases = [PHASES[i] for i in modules.phases_of(profile)]
    calls: dict[str, int] = {}
    for row in profile.operators:
        calls[row.op] = calls.get(row.op, 0) + row.calls
    by_phase = {phase: profile.by_operator(phase) for phase in phases}
    whole = profile.hardware_flops
    heads = [Head("Operator"), Head("Calls"), *(Head(phase.capitalize(), "FLOPs") for phase in phases), Head("Share")]
    rows = [
        [
            op,
            exact(calls[op]),
            *(exact(by_phase[phase].get(op, 0)) for phase in phases),
            format_share(flops, whole),
        ]
        for op, flops in profile.by_operator().items()
    ]
    total = ["all", exact(sum(calls.values())), *(exact(profile.by_phase()[phase]) for phase in phases), "100.0%"]
    chart = _bars(profile, phases)
    body = figure("operators-chart", label="FLOPs by operator and phase, as in the table", height=chart["height"])
    body += table(heads, [*rows, total], caption="FLOPs by operator and phase")
    by_dtype = {phase: profile.by_dtype(phase) for phase in phases}
    dtypes = [
        [dtype, *(exact(by_dtype[phase].get(dtype, 0)) for phase in phases), format_share(flops, whole)]
        for dtype, flops in profile.by_dtype().items()
    ]
    body += table([Head("Dtype"), *heads[2:]], dtypes, caption="FLOPs by dtype of what is multiplied")
    yield Section(
        anchor="operators",
        title="Operators and phases",
        body=body,
        figures={"operators-chart": {"data": chart["data"], "layout": chart["layout"]}},
    )


def _bars(profile: Profile, phases: Sequence[Phase]) -> dict[str, Any]:
    shown = [op for op, flops in profile.by_operator().items() if flops][:_BARS]
    traces = []
    for phase in phases:
        flops = profile.by_operator(phase)
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": phase,
                "y": [plot_text(op) for op in shown],
                "x": [float(flops.get(op, 0)) for op in shown],
                "text": [f"{phase}: {flops.get(op, 0):,} FLOPs" for op in shown],
                "textposition": "none",
                "hovertemplate": "%{y}<br>%{text}<extra></extra>",
                "marker": {"color": PHASE_COLOURS[phase]},
            }
        )
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "FLOPs"}, "automargin": True, "tickformat": "~s"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "showlegend": len(phases) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "bargap": 0.25,
    }
    return {"data": traces, "layout": layout, "height": 110 + 30 * max(len(shown), 1)}
