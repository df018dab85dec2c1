"""Small pieces of HTML, in which every text is escaped: tables, labelled facts, boxes for charts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flopprof.units import format_si


@dataclass(frozen=True)
class Head:
    """One column of a table: its head, and the unit under it; number: right-aligned, but for the first column."""

    text: str
    unit: str = ""
    number: bool = True


def escape(text: object) -> str:
    """Text as it stands, for a page or an attribute: no character of it is markup."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def exact(count: int | None) -> str:
    """The integer itself, digits in threes: `8,178,368,512`; empty where there is none."""
    return "" if count is None else f"{count:,}"


def scaled(flops: int, unit: str = "FLOPs") -> str:
    """`8,178,368,512 FLOPs (8.178 GFLOPs)`: the integer, and what one remembers of it."""
    return f"{flops:,} {unit}" + (f" ({format_si(flops, unit)})" if abs(flops) >= 1000 else "")


def table(heads: Sequence[Head], rows: Iterable[Sequence[str]], *, caption: str) -> str:
    """A table that scrolls sideways in its own box; the first cell of a row is its head. caption: read to the blind."""
    first, *others = heads
    top = f'<th scope="col">{escape(first.text)}{_unit(first)}</th>'
    top += "".join(f'<th scope="col"{_align(head)}>{escape(head.text)}{_unit(head)}</th>' for head in others)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td{_align(head)}>{escape(cell)}</td>" for head, cell in zip(others, cells, strict=True))
        + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f'<caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(lines: Iterable[tuple[str, str]]) -> str:
    """Labelled sentences; an empty label continues the fact above."""
    parts = [f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in lines]
    return f'<dl class="facts">{"".join(parts)}</dl>' if parts else ""


def paragraph(text: str, *, css: str = "") -> str:
    """One paragraph of plain text."""
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def figure(name: str, *, label: str, height: int) -> str:
    """The box that a chart is drawn into by the script; without scripts there is none. label: read to the blind."""
    return f'<div class="chart" id="{name}" role="img" aria-label="{escape(label)}" style="height:{height}px"></div>'


def _align(head: Head) -> str:
    return ' class="number"' if head.number else ""


def _unit(head: Head) -> str:
    return f'<span class="unit">{escape(head.unit)}</span>' if head.unit else ""
