"""Verdict -> what `flopprof check` prints: each figure beside its limit, and who is to blame."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.compare.budget import Verdict
from flopprof.report.facts import Facts


def render(verdict: Verdict, *, heading: str = "") -> RenderableType:
    """The whole report as one renderable; width, colour and file are its printer's."""
    broken = {excess.figure for excess in verdict.excesses}
    title = ", ".join(part for part in (verdict.target, heading) if part)
    lines = []
    for limit in verdict.limits:
        unit = " FLOPs" if limit.figure.endswith("flops") else ""
        mark = "over" if limit.figure in broken and limit.found > limit.limit else "ok"
        against = f"  ({limit.against})" if limit.against else ""
        lines.append((mark, f"{limit.figure} {limit.found:,}{unit}, at most {limit.limit:,}{unit}{against}"))
    lines += [("", excess.sentence) for excess in verdict.excesses]
    parts: list[RenderableType] = [Text(title, style="bold", overflow="fold"), Text()] if title else []
    return Group(*parts, Facts(lines))
