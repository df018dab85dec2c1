"""The catalogue as a table: one line a model, its parameters and what a forward costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import format_si

_DIGITS = 3


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model. `flops`: of one forward, per token or per sample (`per`) of tokens, a square image, seconds of sound.

    active: parameters that a token visits, None where that is all of them. counted: by a run, not by a closed form.
    runs_every_expert: the model's code multiplies those that a token does not visit, too.
    """

    name: str
    family: str
    parameters: int
    active: int | None
    flops: int
    per: str
    tokens: int | None
    image: int | None
    seconds: float | None
    counted: bool
    runs_every_expert: bool


def render(lines: Sequence[Line]) -> RenderableType:
    """The table, and what its columns mean."""
    columns = [
        Column("Model", number=False),
        Column("Family", number=False, elastic=True, optional=True),
        Column("Params"),
        Column("Active"),
        Column("FLOPs"),
        Column("Per", number=False),
    ]
    rows = [
        [
            line.name,
            line.family,
            format_parameters(line.parameters),
            format_parameters(line.active) if line.active is not None else "",
            format_si(line.flops, digits=_DIGITS),
            _per(line),
        ]
        for line in lines
    ]
    return Group(Grid(columns, rows), Text(), Facts(list(_facts(lines))))


def format_parameters(count: int) -> str:
    """Parameters as the field writes them: `8.03B`, `124M`."""
    return format_si(count, digits=3).replace(" G", "B").replace(" ", "")


def _per(line: Line) -> str:
    """`token of 4096`, `image 224`, `224 px, 77 tok`, `30 s, 448 tok`; * where counted, + where a run does more."""
    if line.per == "token":
        text = f"token of {line.tokens}"
    elif line.tokens is None and line.image is not None:
        text = f"image {line.image}"
    else:
        parts = ((line.image, "px"), (line.seconds, "s"), (line.tokens, "tok"))
        text = ", ".join(f"{size:g} {unit}" for size, unit in parts if size is not None)
    return f"{text} *" if line.counted else f"{text} +" if line.runs_every_expert else text


def _facts(lines: Sequence[Line]) -> list[tuple[str, str]]:
    facts = [
        ("Params", "all parameters, tied ones once. Active: without the experts that a token does not visit"),
        ("FLOPs", "of one forward, a multiply-add being 2, attention over every query-key pair"),
    ]
    if any(line.per == "token" for line in lines):
        facts.append(
            ("Per", "token of N: on average in a text of N tokens, encoder-decoders: N on both sides; no image")
        )
    if any(line.image is not None for line in lines):
        facts.append(("", "image N, N px: one square image of that side"))
    if any(not line.counted for line in lines):
        facts.append(("", "closed form: 2 x (active parameters that are multiplied) + attention"))
    if any(line.counted for line in lines):
        facts.append(("*", "counted on the meta device, as `flopprof count` does"))
    if any(line.runs_every_expert for line in lines):
        facts.append(("+", "a run does more: the model's code multiplies every expert by every token"))
    return facts
