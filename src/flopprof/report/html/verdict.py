"""Verdict and profile -> a page: each figure beside its limit, who is to blame, and where the FLOPs are."""

from __future__ import annotations

from flopprof.compare.budget import Limit, Verdict
from flopprof.profile import Profile
from flopprof.report.html import modules
from flopprof.report.html.elements import Head, exact, paragraph, table
from flopprof.report.html.page import Section, page
from flopprof.report.html.profile import operators, totals


def render(verdict: Verdict, profile: Profile, *, heading: str = "") -> str:
    """The page of a verdict on this profile. Raises MissingPackage without plotly."""
    said = "over its budget" if verdict.excesses else "within its budget"
    heads = [Head("Figure"), Head("Verdict", number=False), Head("Found"), Head("At most"), Head("Left")]
    heads.append(Head("Against", number=False))
    broken = {excess.figure for excess in verdict.excesses}
    rows = [
        [
            limit.figure.replace("_", " "),
            "over" if limit.figure in broken and limit.found > limit.limit else "ok",
            _written(limit, limit.found),
            _written(limit, limit.limit),
            _written(limit, limit.limit - limit.found),
            limit.against or "as given",
        ]
        for limit in verdict.limits
    ]
    body = "".join(paragraph(excess.sentence, css="warning") for excess in verdict.excesses)
    body += table(heads, rows, caption="Each figure beside its limit")
    parts = [Section(anchor="budget", title="Budget", body=body), totals(profile), modules.chart(profile)]
    name = verdict.target or profile.target or "The model"
    return page(f"{name} is {said}", heading, [*parts, *operators(profile), modules.listing(profile)])


def _written(limit: Limit, count: int) -> str:
    return exact(count) + (" FLOPs" if limit.figure.endswith("flops") else "")
