"""The frame of every page: one file with its own style, scripts, data and plotly, that asks the network for nothing."""

from __future__ import annotations

import base64
import functools
import gzip
import importlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flopprof.errors import MissingPackage
from flopprof.report.html.elements import escape

# The browser itself then refuses every request, also of a script that somebody smuggled in through a name.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page: its anchor, its heading, HTML whose texts are escaped, and what its scripts need.

    figures   plotly figures (`data`, `layout`) by the id of the box that they are drawn into
    data      what the scripts named in `scripts` (files of assets/, without .js) read, by name
    """

    anchor: str
    title: str
    body: str
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    scripts: Sequence[str] = ()


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole page as text. title and lead: plain text. Raises MissingPackage without plotly."""
    licence, plotly = _packed(plotly_js())
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in sections)
    bodies = "".join(
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-title">'
        f'<h2 id="{part.anchor}-title">{escape(part.title)}</h2>{part.body}</section>'
        for part in sections
    )
    below = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    data: dict[str, Any] = {"figures": {name: value for part in sections for name, value in part.figures.items()}}
    for part in sections:
        data |= part.data
    scripts = ["page", *dict.fromkeys(name for part in sections for name in part.scripts), "start"]
    code = "\n".join(asset(f"{name}.js") for name in scripts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="flopprof">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{asset("page.css")}</style>\n'
        '<script>document.documentElement.classList.add("scripted")</script>\n</head>\n<body>\n'
        f"<header><div><h1>{escape(title)}</h1>{below}</div>"
        '<button type="button" id="theme" class="scripted-only" aria-pressed="false">Dark</button></header>\n'
        f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>\n<main>\n{bodies}\n</main>\n'
        "<footer><p>Made by flopprof. One multiply-add is 2 FLOPs.</p></footer>\n"
        f'<script type="application/json" id="data">{as_json(data)}</script>\n'
        # packed, as text: start.js unpacks and runs it once the page can be read
        f'<script type="text/plain" id="plotly-licence">{licence}</script>\n'
        f'<script type="text/plain" id="plotly-js">{plotly}</script>\n'
        f'<script>(() => {{\n"use strict";\n{code}}})();</script>\n</body>\n</html>\n'
    )


def as_json(data: object) -> str:
    """JSON that can stand inside a script element: no `<` is left that could end it, whatever a name holds.

    Integers that a browser's number would round are strings of digits.
    """
    return json.dumps(_safe(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def plot_text(text: object) -> str:
    """Text as it stands, for plotly, which reads some tags and entities in what it writes."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def asset(name: str) -> str:
    """A file of assets/, which the package brings."""
    return importlib.resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def require_plotly() -> None:
    """Raises MissingPackage, which says how to get plotly, where it is not installed: said before the work."""
    try:
        importlib.import_module("plotly.offline")
    except ImportError as error:
        raise MissingPackage("an HTML report needs plotly: pip install 'flopprof[html]'.") from error


def plotly_js() -> str:
    """plotly.js as the installed plotly brings it, licence and all. Raises MissingPackage."""
    require_plotly()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@functools.lru_cache(maxsize=1)
def _packed(code: str) -> tuple[str, str]:
    """The notice at the head of a script as it stands, and the whole script as base64 of gzip: 2 MB of plotly's 4.8."""
    notice, end, _ = code.partition("*/")
    packed = gzip.compress(code.encode(), compresslevel=6, mtime=0)
    return (notice + end if end else "").replace("<", ""), base64.b64encode(packed).decode()


def _safe(value: object) -> object:
    match value:
        case bool() | None | str() | float():
            return value
        case int():
            return value if abs(value) < 2**53 else str(value)
        case Mapping():
            return {str(key): _safe(item) for key, item in value.items()}
        case _:
            assert isinstance(value, Sequence)
            return [_safe(item) for item in value]
