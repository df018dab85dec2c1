"""Results as small static tables, for notebooks: no script, no style sheet, every name escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flopprof.profile import PHASES, Profile
from flopprof.report.html.elements import escape
from flopprof.report.ledger import stages, verdict, words
from flopprof.report.tree import Node, module_tree
from flopprof.units import format_share, format_si

if TYPE_CHECKING:
    from flopprof.ledger import Ledger

_DEPTH = 2
_ROWS = 40


def profile_html(profile: Profile) -> str:
    """Totals as exact integers, modules (two levels, repeated blocks as one) and operators, in FLOPs."""
    used = {row.phase for row in profile.operators if row.flops} | {row.phase for row in profile.uncounted_rows}
    phases = [i for i, phase in enumerate(PHASES) if phase == "forward" or phase in used]
    parts = [_title(profile.target or "Profile"), _totals(profile, phases), _modules(profile, phases)]
    by_phase = [profile.by_operator(PHASES[i]) for i in phases]
    rows = [
        [op, *(f"{table.get(op, 0):,}" for table in by_phase), format_share(flops, profile.hardware_flops)]
        for op, flops in profile.by_operator().items()
    ]
    heads = ["Operator", *(f"{PHASES[i].capitalize()}, FLOPs" for i in phases), "Share"]
    if rows:
        parts.append(f"<details><summary>Operators</summary>{_table(heads, rows)}</details>")
    notes = [f"1 multiply-add = 2 FLOPs; attention {profile.attention}; device {profile.device}."]
    if profile.uncounted:
        named = ", ".join(f"{op} x{calls}" for op, calls in profile.uncounted.items())
        notes.append(f"No formula for {named}: what they do is in no number (hence >=).")
    return "".join([*parts, *(f"<p>{escape(note)}</p>" for note in (*notes, *profile.assumptions))])


def ledger_html(ledger: Ledger) -> str:
    """The waterfall from 2 N T and 6 N T to the measured count, in exact integers, and what it means."""
    rows: list[list[str]] = []
    for part in stages(ledger):
        rows.append([part.estimate, f"{part.estimate_flops:,}", "100.0%", ""])
        for term in part.terms:
            if term.flops:
                share = format_share(term.flops, part.estimate_flops)
                rows.append([words(term), f"{term.flops:+,}", share, term.sentence])
        share = format_share(part.measured_flops, part.estimate_flops)
        rows.append([f"= {part.measured}", f"{part.measured_flops:,}", share, ""])
    facts = "<br>".join(f"<b>{escape(label)}</b> {escape(text)}" for label, text in verdict(ledger))
    factor = 6 if ledger.backward is not None else 2
    heads = ["Step", "FLOPs", "Of the estimate", ""]
    return f"{_title(f'Why not {factor} N T')}{_table(heads, rows, words_last=True)}<p>{facts}</p>"


def _totals(profile: Profile, phases: Sequence[int]) -> str:
    holes = {row.phase for row in profile.uncounted_rows}
    rows: list[tuple[str, int, bool]] = [(PHASES[i], profile.by_phase()[PHASES[i]], PHASES[i] in holes) for i in phases]
    if len(phases) > 1:
        rows.append(("model: forward + backward", profile.model_flops, bool(holes & {"forward", "backward"})))
        rows.append(("hardware: all executed", profile.hardware_flops, bool(holes)))
    rows.append(("elementwise, apart", profile.elementwise_flops, False))
    cells = [
        [label, f"{'>= ' if bound else ''}{flops:,}", format_si(flops, "FLOPs"), format_si(flops // 2, "MACs")]
        for label, flops, bound in rows
    ]
    cells.append(["parameters", f"{profile.n_params:,}", format_si(profile.n_params), ""])
    return _table(["", "FLOPs", "", "MACs"], cells)


def _modules(profile: Profile, phases: Sequence[int]) -> str:
    root = module_tree(profile)
    shown = list(_visible(root, 0))
    rows = [
        [
            "\N{NO-BREAK SPACE}" * 4 * level
            + (f"{node.name} ({node.repeats}x)" if node.repeats > 1 else node.name or profile.target or "(all)"),
            f"{node.parameters:,}",
            *(f"{'>= ' if node.uncounted[i] else ''}{node.flops[i]:,}" for i in phases),
            format_share(node.total, root.total),
        ]
        for level, node in shown[:_ROWS]
    ]
    heads = ["Module", "Parameters", *(f"{PHASES[i].capitalize()}, FLOPs" for i in phases), "Share"]
    more = f"<p>{len(shown) - _ROWS} more modules.</p>" if len(shown) > _ROWS else ""
    return f"<details open><summary>Modules</summary>{_table(heads, rows)}{more}</details>"


def _visible(node: Node, level: int) -> Iterator[tuple[int, Node]]:
    yield level, node
    if level < _DEPTH:
        for child in node.children:
            yield from _visible(child, level + 1)


def _title(text: str) -> str:
    return f"<p><b>{escape(text)}</b></p>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words_last: bool = False) -> str:
    """Numbers to the right; names, and with words_last the last column, to the left."""
    left = {0, len(heads) - 1} if words_last else {0}

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f'<{tag} style="text-align:{"left" if i in left else "right"}">{escape(text)}</{tag}>'
            for i, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', heads)}</tr></thead><tbody>{body}</tbody></table>"
