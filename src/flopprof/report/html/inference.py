"""Inference -> a page: what generating text takes, and where a pass has its FLOPs."""

from __future__ import annotations

from flopprof.hardware.table import Device
from flopprof.inference.result import Inference
from flopprof.profile import Profile
from flopprof.report.html import modules, roofline
from flopprof.report.html.elements import facts, paragraph
from flopprof.report.html.page import Section, page
from flopprof.report.html.profile import operators, totals
from flopprof.report.inference import facts as told
from flopprof.report.inference import heading


def render(found: Inference, *, hardware: Device | None = None) -> str:
    """The page of a prefill, a decoding step or a generation. Raises MissingPackage without plotly."""
    parts = [Section(anchor="text", title="Generating text", body=facts(told(found)))]
    which, profile = _shown(found)
    if profile is not None:
        parts += [_noted(totals(profile), which), modules.chart(profile), *operators(profile)]
        parts += [*roofline.section(profile, hardware), modules.listing(profile)]
    return page(found.target, heading(found), parts)


def _shown(found: Inference) -> tuple[str, Profile | None]:
    """Of a generation its first decoding step, which is what most of its time goes to; else the one that there is."""
    if found.decode is not None:
        return ("one decoding step" if found.mode == "decode" else "the first decoding step"), found.decode
    return "the prefill", found.prefill


def _noted(section: Section, which: str) -> Section:
    """The totals, with what they are of."""
    body = paragraph(f"Of {which}, as are the charts and tables below.", css="note") + section.body
    return Section(anchor=section.anchor, title=section.title, body=body)
